"""Which tests CI leaves to the night, and which are numerical.

CI's nightly run has it all: ``tests/run.sh --faults`` runs all cases of what is in the table of faults, and
``tests/run.sh -m "soak and not slurm"`` and ``--slurm -m slurm`` what else was left out.
"""

from collections import Counter
from pathlib import Path

import pytest

import faults

MANY = (
    "test_no_method_drifts_by_itself",
    "test_compiled_in_ddp_is_uncompiled",
)
"""Slow tests of many cases, of which CI runs the last, as a rule the one with the most ranks."""
SAMPLED = {
    "test_a_step_stays_on_the_gpu_and_the_host_never_waits": 15,
    "test_a_recipes_step_is_as_in_the_table": 15,
    "test_the_librarys_model_computes_the_encoders_features": 8,
    "test_its_flags_build_the_encoder_of_the_file": 8,
    "test_it_learns_a_fixed_batch": 8,
    "test_its_state_is_all_that_a_restart_needs": 4,
    "test_a_step_that_is_not_finite_leaves_no_trace": 4,
    "test_the_same_seed_gives_the_same_numbers": 4,
    "test_a_step_that_is_not_finite_leaves_no_trace_in_any_optimizer": 4,
    "test_a_run_stops_before_it_saves_what_is_not_finite": 3,
    "test_hardly_any_images_are_a_line_and_no_traceback": 4,
    "test_the_source_of_older_schemas_becomes_a_section_of_its_own": 4,
    "test_each_recipe_loads_and_says_what_it_takes": 6,
    "test_every_method_says_what_it_is_and_has_values_for_every_situation": 5,
    "test_the_owners_model_is_identified_loaded_and_computes_the_same": 5,
    "test_a_batch_script_runs_none_of_its_values": 4,
    "test_every_command_of_the_table_of_formats_trains": 3,
    "test_nothing_waits_for_the_device": 3,
    "test_the_gradient_of_all_micro_batches_is_clipped_before_the_update": 3,
    "test_permuted_is_as_random_as_numpys_permutation": 3,
    "test_two_ranks_stop_together": 3,
    "test_a_file_that_does_not_answer_ends_the_wait_at_the_limit": 3,
    "test_a_planted_fault_is_found": 3,
    "test_every_command_of_the_table_trains": 3,
    "test_a_thousand_claims_are_what_the_loader_delivered": 2,
    "test_what_cannot_be_read_is_replaced_by_the_same_images": 3,
    "test_images_are_prepared_as_the_library_does": 3,
    "test_all_ranks_write_what_one_does": 2,
    "test_a_compiled_embed_is_used_and_can_be_left_out": 4,
    "test_a_restart_finds_the_good_one_before": 3,
    "test_a_restart_on_another_number_of_ranks_goes_on_with_the_samples_left": 3,
    "test_fit_reaches_the_optimum_on_features_that_are_nearly_one_direction": 2,
    "test_the_gradients_of_this_backward_are_those_of_torchs_engine": 4,
    "test_a_signal_while_it_starts_is_one_line_and_its_code": 3,
    "test_memory_does_not_grow_with_the_rows": 3,
    "test_damaged_scores_cost_nothing_else": 2,
    "test_ranks_give_the_full_batch_loss_and_gradient": 3,
    "test_the_slow_rank_is_found_wherever_it_is_slow": 3,
    "test_batches_are_those_of_the_files_in_a_folder": 3,
    "test_arrays_are_the_pictures_in_a_folder": 3,
    "test_ranks_give_the_loss_and_the_gradients_of_the_whole_batch": 2,
    "test_health_and_the_online_probe_read_their_numbers_and_little_else": 3,
    "test_two_ranks_train_as_one_does_with_synchronized_batch_norm": 2,
    "test_a_signal_ends_a_wait_and_no_batch_is_lost": 3,
    "test_batches_are_those_of_the_same_files_by_path": 3,
    "test_what_is_built_leaves_the_callers_random_numbers_alone": 3,
    "test_ranks_together_make_the_batches_of_one": 3,
    "test_the_code_of_the_card_prepares_images_as_the_probes_do": 3,
    "test_another_optimizers_state_is_refused": 3,
    "test_planted_faults_are_found": 3,
    "test_any_trunk_gives_a_vector_an_image_and_is_channels_last": 3,
    "test_blocks_are_read_a_window_at_a_time_and_every_sample_once": 2,
    "test_every_sample_has_one_of_its_captions_and_in_time_each_of_them": 3,
    "test_bf16_autocast_keeps_the_loss_in_fp32_and_finite": 3,
    "test_bf16_is_taken_where_it_is_fast_and_refused_where_it_is_wrong": 2,
    "test_what_is_sent_to_the_whole_process_group_ends_no_worker": 3,
    "test_a_picture_of_confusions_names_few_classes_and_lists_those_of_many": 2,
    "test_a_step_never_waits_for_the_device": 3,
    "test_splits_are_told_before_the_first_step_and_end_no_run": 2,
    "test_damaged_images_are_replaced_by_the_same_ones": 2,
    "test_a_restart_delivers_the_rest_of_the_epoch_once": 2,
    "test_every_norm_of_a_method_is_that_of_its_encoder": 3,
    "test_every_damage_is_found": 2,
    "test_drift_is_named": 3,
    "test_a_step_gives_a_scalar_and_metrics_and_every_parameter_a_gradient": 3,
    "test_short_runs_on_a_cpu_take_what_the_recipes_for_cpus_were_tuned_with": 3,
    "test_the_average_of_the_encoder_takes_its_place": 3,
    "test_batches_from_an_archive_are_those_of_its_files": 3,
    "test_official_files_become_what_timm_makes_of_them": 2,
    "test_what_a_method_cannot_train_on_is_refused_before_anything_is_read": 2,
    "test_ranks_give_l_out_over_the_whole_batch": 3,
    "test_a_dead_owner_is_recognized": 2,
    "test_other_world_sizes_and_restarts_take_the_same_stand_ins": 3,
    "test_a_checkpoint_without_a_recipe_gives_the_same_encoder": 3,
    "test_timm_models_take_their_own_files_with_one_head_or_two": 2,
    "test_the_mask_token_takes_the_place_of_masked_patches_before_positions_are_added": 3,
    "test_an_encoder_is_built_again_from_the_json_of_its_recipe": 3,
    "test_an_error_of_the_device_is_what_it_is": 3,
    "test_is_within_the_kernels_promise_of_fp64": 2,
    "test_is_the_definition": 2,
    "test_nor_with_rotations_gain_and_noise": 3,
    "test_a_server_that_fails_every_third_time_changes_no_batch": 4,
    "test_a_run_goes_on_exactly_and_embeds_as_it_was_trained": 3,
    "test_each_operation_after_a_crop": 2,
    "test_a_view_does_not_depend_on_its_batch": 2,
    "test_a_batch_is_one_copy_and_nothing_waits": 2,
    "test_a_restart_goes_on_bit_identically": 2,
    "test_resumed_twice_is_bit_identical": 2,
    "test_a_restart_takes_the_good_one_before": 2,
    "test_accuracy_is_that_of_scikit_learn_on_the_same_draws": 3,
    "test_a_limit_that_is_not_reached_and_none_give_the_same_bits": 2,
    "test_dimensions": 2,
    "test_sync_bn_is_batch_norm_of_the_whole_batch": 3,
    "test_spawned_workers": 2,
    "test_checkpoints_are_those_of_a_run_that_sends_buffers_at_every_step": 2,
    "test_what_is_launched_fits_the_gpu_and_does_not_spill": 2,
    "test_ranks_give_equation_4_over_the_whole_batchs_pairs": 2,
}
"""Tests of which CI runs every so many-th case, counted from the last."""
NIGHTLY = (
    "test_the_command_says_what_limits_a_recipe_and_what_to_take",
    "test_a_part_of_every_script_runs_on_the_cpu_with_small_sizes",
    "test_its_tests_need_no_package_that_a_lent_machine_may_lack",
    "test_a_restart_with_other_code_says_so_and_one_with_the_same_does_not",
    "test_without_slurm_the_job_itself_asks_whether_to_start_again",
    "test_a_sweep_says_which_run_failed_and_trains_the_others",
    "test_paths_in_a_recipe_are_bytes_under_an_ascii_locale",
    "test_training_goes_on_to_its_end",
    "test_nor_with_other_instructions",
    "test_a_run_goes_on_without_the_file_that_it_began_with",
    "test_a_file_with_a_layouts_names_and_other_shapes_is_one_line",
    "test_compiled_ranks_train_as_eager_ones_do_and_resume_bit_for_bit",
    "test_multi_crop_methods_do_not_drift_in_bf16",
    "test_a_method_that_fails_on_one_rank_only_is_named",
    "test_the_readmes_method_is_one_file_that_trains_and_is_the_same_on_three_ranks",
    "test_what_was_freed_is_not_faulted_in_again_on_a_cpu_alone",
    "test_commands_that_look_at_the_machine",
    "test_a_weight_that_drifts_away_is_noticed_at_the_next_save",
    "test_jobs_tells_a_killed_run_from_one_that_goes_on",
    "test_a_display_is_killed_without_a_trace",
    "test_ctrl_c_in_the_first_step_also_ends_the_compiler",
    "test_a_wrong_flag_on_two_ranks_is_explained_once",
    "test_two_ranks_say_everything_once",
    "test_simsiam_without_stop_gradient_collapses_and_is_told",
    "test_wandb_without_a_server_goes_on_offline",
    "test_ctrl_c_is_answered_and_the_command_it_ends_with_goes_on",
    "test_a_run_and_what_follows",
    "test_a_mount_that_does_not_answer_ends_the_list_of_images",
    "test_the_rank_whose_step_or_loader_is_slow_is_named",
    "test_a_batch_that_does_not_fit_ends_in_one_line",
    "test_ranks_train_as_one_with_a_queue_in_use",
    "test_by_their_own_names_or_over_another_network_they_would_not_meet",
    "test_the_estimate_is_what_a_step_takes",
    "test_two_ranks_look_together",
    "test_of_two_runs_that_start_at_once_exactly_one_goes_on",
    "test_a_gradient_of_one_wth_is_found",
    "test_the_scores_of_weights_go_only_where_the_user_says",
    "test_all_ranks_stopped_are_ended_too",
    "test_killing_it_leaves_no_loader_worker",
    "test_a_mistake_on_two_ranks_is_one_line_too",
    "test_encoders_of_the_usual_size",
    "test_narrow_encoders_train_with_the_gradients_of_plain_code",
    "test_what_it_sets",
    "test_ranks_wait_for_the_main_one_longer_than_a_collective_would",
    "test_equal_in_fp64_for_many_steps",
    "test_a_sweep_trains_all_runs_and_goes_on",
    "test_timm_does_not_bring_wandb",
    "test_what_is_said_before_giving_up_may_hang_itself",
    "test_ranks_of_three_machines_find_the_network_that_leads_to_the_others",
    "test_a_probe_at_another_size",
    "test_the_slow_rank_is_found_wherever_it_is_slow",
    "test_no_damage_to_a_checkpoint_gives_more_than_an_older_one",
    "test_a_local_job_that_is_stopped_before_its_first_step_starts_again_too",
    "test_resumed_on_another_world_size_sees_the_samples_that_were_left",
    "test_training_with_all_streams_closed_ends_as_done",
    "test_a_launcher_that_is_told_to_end_at_any_moment_ends_in_good_order",
    "test_the_pictures_of_a_run_on_five_channels",
)
"""Slow tests that CI leaves to the night, because what they show for long others show in short."""
FAULTS = sorted({test for row in faults.ROWS.values() for test in row})
"""Tests of the table of faults.  CI runs one case of every other one of those that are slow."""
NUMERICAL = (
    "losses/", "kernels/", "optim/", "methods/", "machine/test_onednn.py", "data/backends/test_color.py",
    "data/backends/test_parity.py", "data/test_views.py", "probe/test_knn.py", "probe/test_linear.py",
    "monitor/test_health.py", "encoders/", "export/",
    "train/test_verify.py", "train/test_equivalence.py", "train/test_fake_cuda.py", "data/backends/test_on_a_gpu.py",
)  # fmt: skip
"""What depends on the CPU and on the versions of libraries: run again with others (tests/run.sh --oldest, --isa)."""


def mark(items: list[pytest.Item]) -> None:
    """Mark what is numerical, and as soak the tests and cases that CI leaves out."""
    number = Counter[str]()
    for item in reversed(items):
        name = item.nodeid.partition("[")[0]
        function, fault = name.rpartition("::")[2], name.removeprefix("tests/")
        is_slow = item.get_closest_marker("slow") is not None
        name = f"{name} {is_slow}"  # some cases of a test are slow, others not
        if function in SAMPLED:
            left_out = number[name] % SAMPLED[function] > 0
        elif not is_slow:
            left_out = False
        elif function in NIGHTLY:
            left_out = True
        elif fault in FAULTS:
            left_out = number[name] > 0 or FAULTS.index(fault) % 2 == 0
        else:
            left_out = function in MANY and number[name] > 0
        if left_out:
            item.add_marker("soak")
        number[name] += 1
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if path.startswith(NUMERICAL) and path != "kernels/test_ahead_of_time.py":  # which only compiles
            item.add_marker("numerical")
