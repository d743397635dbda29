"""The table of faults: what was done to real processes, and the tests that do it again.

``tests/run.sh --faults`` runs it, and ``tests/run.sh --faults -k WORD`` a part.  As a pytest plugin (``-p faults``) it
runs just these tests and appends a line for each row to ``benchmarks/results/faults.jsonl``.

How to read a line: ``held``: all tests of the row passed, and none was skipped (``num_skipped``); ``num_tests``: each
choice of parameters counts; ``figures``: what the tests measured, as they record it by pytest's
``record_property("figure", ...)``.  The last line of a row is what holds; the lines before are its history.
"""

import ast
import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "benchmarks" / "results" / "faults.jsonl"

ROWS: dict[str, tuple[str, ...]] = {
    # kills, signals and the first and last moments
    "SIGKILL at 50 random moments, each run resumed": ("train/test_kills.py::test_sigkill_at_random_moments",),
    "F3/F4 SIGTERM, SIGUSR2, SIGINT, SIGHUP and pairs at random moments, twice too": (
        "train/test_kills.py::test_stopping_signals_at_random_moments",
        "train/test_stopped_ranks.py::test_a_signal_after_the_outcome_changes_nothing",
    ),
    "SIGTERM, SIGUSR2 and Ctrl-C to a launcher in its first seconds": (
        "train/test_stopped_ranks.py::test_a_launcher_that_is_told_to_end_at_any_moment_ends_in_good_order",
    ),
    "Ctrl-C and others 0.05 s after the start: no traceback": (
        "train/test_stopped_ranks.py::test_a_signal_while_it_starts_is_one_line_and_its_code",
        "train/test_hostile_starts.py::test_a_signal_in_the_very_first_moment_gives_no_traceback",
    ),
    "SIGHUP while training (a terminal that closes), 1 and 2 ranks": (
        "train/test_stopped_ranks.py::test_a_terminal_that_closes_saves_the_run",
    ),
    "SIGXCPU while training (a limit of CPU time), 1 and 2 ranks": (
        "train/test_stopped_ranks.py::test_a_limit_of_cpu_time_saves_the_run",
    ),
    "SIGUSR1 while training, and nohup, 1 and 2 ranks": (
        "train/test_stopped_ranks.py::test_sigusr1_asks_where_the_run_stands_and_nohup_outlives_the_terminal",
    ),
    "F9 rank 0 or 1 stopped, one Ctrl-C, SIGTERM or SIGHUP, SSLX_GIVE_UP_S": (
        "train/test_stopped_ranks.py::test_a_stopped_rank_is_named_and_one_signal_ends_the_run",
        "train/test_stopped_ranks.py::test_all_ranks_stopped_are_ended_too",
    ),
    "F9 rank 1 stopped, SIGTERM, no SSLX_GIVE_UP_S (sslx pretrain by hand)": (
        "train/test_signals.py::test_without_a_word_on_it_the_longest_step_says_how_long_to_wait",
        "train/test_stopped_ranks.py::test_a_collective_that_one_rank_does_not_reach_ends_by_itself_with_its_name",
    ),
    "F9 rank 1 stopped, Ctrl-C twice": (
        "train/test_stopped_ranks.py::test_ctrl_c_twice_ends_a_stopped_rank_at_once",
        "train/test_on_a_terminal.py::test_a_second_ctrl_c_in_a_long_step_ends_it_with_words_and_a_visible_cursor",
    ),
    "A rank, the launcher or all killed: no process is left": (
        "train/test_interruptions.py::test_killing_one_of_two_ranks_ends_the_job_with_one_line",
        "train/test_stopped_ranks.py::test_killing_it_leaves_no_loader_worker",
    ),
    # numbers
    "F7 lr=1e6 from the start, log.every 20, save every 10": (
        "train/test_health.py::test_a_run_whose_weights_are_useless_is_told_so_at_its_end",
    ),
    "F7 gradient inf in the step before a save, in the last step, keep 1, 1 rank": (
        "train/test_finite.py::test_a_run_stops_before_it_saves_what_is_not_finite",
        "train/test_finite.py::test_weights_that_became_infinite_are_not_saved",
    ),
    "F7 gradient inf on rank 1 of 2, in the step before a save": (
        "train/test_finite.py::test_two_ranks_stop_together",
        "train/test_finite.py::test_what_is_not_finite_on_one_rank_is_stepped_on_none",
    ),
    "F7 --on-nonfinite skip: up to K in a row, then back to the last good checkpoint": (
        "train/test_finite.py::test_a_run_skips_a_few_steps_where_asked_to",
        "train/test_finite.py::test_two_ranks_skip_together",
        "train/test_finite.py::test_after_too_many_in_a_row_it_goes_back_and_ends_as_if_nothing_had_been",
        "train/test_finite.py::test_it_goes_back_only_once_to_the_same_checkpoint",
    ),
    "F7 a checkpoint or initial weights that are not finite": (
        "train/test_finite.py::test_a_checkpoint_that_is_not_finite_is_not_gone_on_from",
        "train/test_finite.py::test_initial_weights_that_are_not_finite_are_refused_as_such",
    ),
    # ranks
    "F8 rank 1 of 2 was given --seed 1, --optim.lr, --checkpoint.every, --log.every, other code": (
        "train/test_consistency.py::test_a_rank_with_another_setting_is_refused",
        "train/test_consistency.py::test_a_rank_with_other_code_is_refused",
        "train/test_consistency.py::test_other_images_or_parameters_are_refused",
    ),
    "F8 perturb: one weight of rank 1 changed in step 15": (
        "train/test_consistency.py::test_a_weight_that_drifts_away_is_noticed_at_the_next_save",
        "train/test_consistency.py::test_drift_is_named",
    ),
    "F8 one collective too many on rank 1 in step 15": (
        "train/test_consistency.py::test_a_rank_in_another_collective_is_named_within_a_minute_or_two",
    ),
    "F17 rank 1's step or loader 0.5 s slower": (
        "train/test_hostile_starts.py::test_the_rank_whose_step_or_loader_is_slow_is_named",
        "train/test_clock.py::test_the_slow_rank_is_found_wherever_it_is_slow",
        "train/test_clock.py::test_a_straggler_is_named_once_with_the_cause",
    ),
    # ports and the environment
    "F14 two launchers of the same pid (containers on the host's network) at the same moment": (
        "train/test_hostile_starts.py::test_launchers_of_the_same_pid_on_one_network_at_the_same_moment",
        "machine/test_rendezvous.py::test_launchers_at_the_same_moment_have_ports_of_their_own",
    ),
    "F14 MASTER_PORT taken by another process": (
        "train/test_hostile_starts.py::test_a_port_that_another_process_has_is_one_line",
        "machine/test_rendezvous.py::test_a_port_that_is_taken_for_a_moment_only_is_waited_for",
        "machine/test_rendezvous.py::test_something_else_that_listens_is_no_rank_0",
    ),
    "hostile environment: RANK=x, WORLD_SIZE=0, out of range, MASTER_PORT=x, SSLX_GIVE_UP_S=abc, SLURM_*": (
        "train/test_hostile_starts.py::test_an_environment_that_cannot_be_is_one_line_at_once",
        "machine/test_environment.py::test_what_cannot_be_is_refused_by_its_name_in_one_line",
    ),
    "hostile environment: MASTER_ADDR=no.such.host.invalid, ranks that never come": (
        "train/test_hostile_starts.py::test_ranks_that_cannot_meet_are_one_line",
        "machine/test_rendezvous.py::test_an_address_that_is_none_is_one_line_soon",
    ),
    "the current folder deleted before the start": (
        "train/test_hostile_starts.py::test_a_current_folder_that_was_deleted_is_one_line",
    ),
    # owners of a run folder
    "--resume auto of a run that is still running, 1 and 2 ranks": (
        "train/test_ownership.py::test_resume_of_a_run_that_goes_on_ends_with_one_line",
        "train/test_ownership.py::test_a_run_that_goes_on_is_not_touched_and_a_killed_one_is_resumed_at_once",
    ),
    "two runs started into the same new folder, or with --resume auto, at once": (
        "train/test_ownership.py::test_of_two_runs_that_start_at_once_exactly_one_goes_on",
        "runs/test_lock.py::test_of_several_who_claim_a_free_folder_exactly_one_wins",
        "runs/test_lock.py::test_of_several_successors_of_a_killed_owner_exactly_one_wins",
        "runs/test_lock.py::test_nobody_shares_a_folder_while_owners_are_killed_at_random",
        "runs/test_lock.py::test_containers_in_which_every_process_has_the_pid_1",
    ),
    "a dead owner: pid gone, host silent, Slurm job requeued": (
        "runs/test_lock.py::test_a_dead_owner_is_recognized",
        "runs/test_lock.py::test_a_requeued_job_takes_over_its_own_claim",
        "train/test_ownership.py::test_a_run_whose_folder_another_one_has_by_now_ends_without_a_word_in_it",
    ),
    "run folder deleted in mid-run, 1 and 2 ranks": (
        "train/test_ownership.py::test_a_folder_deleted_in_mid_run_ends_the_run_and_stays_deleted",
        "runs/test_lock.py::test_a_lost_claim_is_noticed",
    ),
    # checkpoints and small files
    "200 bit flips in a checkpoint": ("runs/test_checkpoint_damage.py::test_every_single_bit_flip_is_found",),
    "Fuzz: 500 mutations of manifest.json": (
        "runs/test_checkpoint_damage.py::test_no_damage_to_a_checkpoint_gives_more_than_an_older_one",
        "runs/test_checkpoint_damage.py::test_a_crafted_manifest_is_a_damaged_one",
    ),
    "a checkpoint cut off, a killed save, a full disk": (
        "runs/test_checkpoint_damage.py::test_truncation_falls_back",
        "runs/test_checkpoint_damage.py::test_a_killed_save_leaves_a_good_checkpoint",
        "runs/test_checkpoint_damage.py::test_a_full_disk",
    ),
    "checkpoints/ is a link to a folder with a foreign step_1/precious and step_2 -> images": (
        "runs/test_checkpoint.py::test_only_what_sslx_wrote_is_deleted_or_renamed",
        "runs/test_checkpoint.py::test_a_foreign_folder_is_no_checkpoint_and_no_damaged_one",
    ),
    "a checkpoint of right digest with crafted content: pretrain": (
        "runs/test_state.py::test_a_restart_finds_the_good_one_before",
        "runs/test_state.py::test_a_restart_takes_the_good_one_before",
        "runs/test_state.py::test_another_optimizers_state_is_refused",
        "runs/test_state.py::test_images_that_sslx_did_not_note_are_refused",
        "runs/test_checkpoint_damage.py::test_a_hostile_pickle_is_not_run",
    ),
    "a checkpoint of right digest with crafted content: probe and plot": (
        "runs/test_state.py::test_what_a_probe_cannot_read_is_refused_in_one_line",
        "runs/test_state.py::test_the_commands_end_with_that_line",
    ),
    "config.json, run_id, status.json nested, not UTF-8, a folder, missing: --resume auto": (
        "train/test_damaged_run.py::test_a_run_goes_on_whatever_its_small_files_hold",
    ),
    "status.json, metrics.jsonl, stops.jsonl nested, of wrong types, with markup: sslx jobs": (
        "cluster/test_jobs.py::test_damaged_runs_are_a_row_each_and_end_no_listing",
        "cluster/test_jobs.py::test_any_name_of_a_run_is_text",
        "cluster/test_jobs.py::test_a_crafted_job_signals_nobody",
    ),
    "metrics.jsonl step 1e400: sslx plot": (
        "plot/test_plot.py::test_a_step_that_came_twice_counts_once_and_the_later_holds",
    ),
    "cost of a save, ResNet-50 SimCLR (fp32 + SGD momentum)": (
        "runs/test_checkpoint.py::test_what_a_save_of_a_resnet50_costs",
    ),
    "pipes, folders and devices in place of a checkpoint's files, owner.json, weights, metrics.jsonl": (
        "runs/test_checkpoint_damage.py::test_what_is_no_regular_file_falls_back_without_a_wait",
        "runs/test_lock.py::test_a_pipe_in_the_owners_place_is_waited_for_by_nobody",
        "encoders/test_weights.py::test_a_pipe_and_a_device_are_waited_for_by_nobody",
        "runs/test_log.py::test_a_full_disk_is_told_once_and_survived",
    ),
    # files of settings, names, and what a batch script is made of
    "TOML: nested tables, arrays, inline tables; a million tables side by side; 100,000 keys": (
        "config/test_flags.py::test_a_hostile_file_is_refused_in_one_line_at_once",
        "config/test_flags.py::test_many_keys_that_are_no_options_are_not_each_looked_up",
        "machine/test_files.py::test_nested_toml_costs_no_time",
    ),
    "JSON: nested, a list of pairs, a string of 100 MB": (
        "config/test_flags.py::test_a_file_of_100_mb_costs_no_memory",
        "machine/test_files.py::test_nested_json_costs_no_time",
        "machine/test_files.py::test_json_is_an_object",
        "config/test_pretrain.py::test_a_saved_config_of_another_version_is_one_line",
    ),
    "--name of 300 characters, and other names": (
        "train/test_hostile_starts.py::test_a_name_of_300_characters_is_one_line",
        "config/test_flags.py::test_names_of_runs",
        "config/test_flags.py::test_a_bad_name_is_one_line_wherever_it_comes_from",
    ),
    "sslx submit: shell metacharacters in run folder, name, partition, account, interface, python, ...": (
        "test_injection.py::test_a_batch_script_runs_none_of_its_values",
        "test_injection.py::test_shared_files_run_nothing",
        "test_injection.py::test_the_script_without_submitit_runs_none_of_its_values",
    ),
    # images
    "F6 bad files of every kind in every backend: training": (
        "train/test_bad_files.py::test_bad_files_of_every_kind_in_every_backend",
        "data/codecs/test_formats.py::test_no_file_ends_the_process",
    ),
    "F6 bad files of every kind in every backend: what each becomes, a bomb of 50,000 x 50,000 pixels": (
        "data/codecs/test_formats.py::test_every_kind_is_the_picture_it_was_made_from_or_refused_on_every_backend",
        "data/test_bad_images.py::test_every_damage_is_found",
        "data/codecs/test_formats.py::test_what_cannot_be_opened_is_told_and_waits_for_nothing",
        "data/codecs/test_formats.py::test_names_of_any_bytes_are_read_and_told_in_one_line",
    ),
    "200 bit flips in images, every backend": ("train/test_bad_files.py::test_200_bit_flips_in_images",),
    "F15 60 dangling links, 2 ranks": ("train/test_bad_files.py::test_dangling_links_end_two_ranks_in_one_line",),
    # loader workers and waits
    "F18 a torchvision worker killed (SIGKILL) or stopped (SIGSTOP)": (
        "data/test_workers.py::test_a_worker_that_is_killed_or_stopped_is_named_and_replaced",
        "data/test_workers.py::test_workers_that_are_killed_again_and_again_end_the_wait",
    ),
    "a wait for data that does not come: SIGTERM, the limit": (
        "train/test_waits.py::test_a_signal_while_no_data_comes_saves_the_run_as_it_is",
        "train/test_waits.py::test_files_that_never_answer_end_the_run_with_one_line",
        "train/test_waits.py::test_a_mount_that_does_not_answer_ends_the_list_of_images",
        "data/test_workers.py::test_a_file_that_does_not_answer_ends_the_wait_at_the_limit",
    ),
    "/dev/shm of 64k: torchvision, dali and resident, 2 ranks": (
        "train/test_waits.py::test_little_shared_memory_is_enough",
    ),
    # the machine
    "ulimit -v 1.5, 2.5 and 3.5 GB": (
        "machine/test_limits.py::test_too_little_address_space_is_refused_before_libraries_meet_it",
        "train/test_hostile_starts.py::test_the_least_address_space_that_is_taken_is_enough",
    ),
    "host memory exhausted by a large batch, 1 and 2 ranks": (
        "machine/test_limits.py::test_a_batch_that_does_not_fit_ends_in_one_line",
    ),
    "MemoryError in a step": ("train/test_hostile_starts.py::test_memory_that_ends_in_a_step_is_one_line",),
    "open-file limit 20, 2 ranks": ("machine/test_limits.py::test_a_run_with_too_few_open_files_ends_in_one_line",),
    "stdout closed, all three closed, /dev/full, 1 and 2 ranks": (
        "console/test_streams.py::test_training_goes_on_to_its_end",
        "console/test_streams.py::test_commands_print_whatever_the_streams_are",
        "console/test_streams.py::test_a_closed_stream_is_written_to_by_nobody",
    ),
    "growth over 2000 steps: torchvision 2 workers, digits, 1 rank": (
        "train/test_bad_files.py::test_a_long_run_holds_no_more_than_a_short_one",
    ),
    "A loader worker killed or stopped, or signals to the whole process group": (
        "data/test_workers.py::test_a_worker_that_is_killed_or_stopped_is_named_and_replaced",
        "data/test_workers.py::test_what_is_sent_to_the_whole_process_group_ends_no_worker",
        "data/test_workers.py::test_workers_that_are_killed_again_and_again_end_the_wait",
    ),
    "A file that ends each process that reads it": (
        "data/test_workers.py::test_a_worker_that_a_file_ends_sets_that_file_aside",
    ),
    "Files whose reading hangs, to the limit or until a signal": (
        "data/test_workers.py::test_a_file_that_does_not_answer_ends_the_wait_at_the_limit",
        "train/test_waits.py::test_files_that_never_answer_end_the_run_with_one_line",
        "train/test_waits.py::test_a_signal_while_no_data_comes_saves_the_run_as_it_is",
    ),
    "/dev/shm of 64k, 2 ranks, every backend": ("train/test_waits.py::test_little_shared_memory_is_enough",),
    "A run with loader workers killed by SIGKILL: no orphan": (
        "train/test_stopped_ranks.py::test_killing_it_leaves_no_loader_worker",
    ),
}
"""What was done -> the tests, as FILE::FUNCTION."""


def newest() -> dict[str, dict[str, Any]]:
    """Row -> the last result in git."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {line["row"]: line for line in lines}


@cache
def functions(file: str) -> set[str]:
    """The functions of a test file."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def of_row(nodeid: str) -> list[str]:
    """The rows that a test, tests/FILE::FUNCTION[parameters], belongs to."""
    test = nodeid.partition("[")[0].removeprefix("tests/")
    return [row for row, tests in ROWS.items() if test in tests]


class _Rows:
    """Reports of the tests of each row, and the lines that they end as."""

    def __init__(self) -> None:
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if of_row(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for row in of_row(report.nodeid):
                self.reports[row].append(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):  # one of several processes, whose reports come together in the first
            return
        from sslx.bench import measure

        stamp = measure.stamp()
        for row, reports in self.reports.items():
            figures = [text for r in reports for name, text in r.user_properties if name == "figure"]
            num_skipped = sum(report.outcome == "skipped" for report in reports)
            record: dict[str, Any] = {
                "benchmark": "faults",
                "row": row,
                "held": all(report.outcome == "passed" for report in reports),
                "figures": figures,
                "num_skipped": num_skipped,
                "num_tests": len(reports),
                "seconds": round(sum(report.duration for report in reports), 1),
            }
            left_out = set(ROWS[row]) - {report.nodeid.partition("[")[0].removeprefix("tests/") for report in reports}
            if not left_out:
                measure.append(RESULTS, {**record, **stamp})
            told = "; ".join(map(str, figures)) or f"{len(reports)} cases"
            told += f" (not written down: {len(left_out)} of the row's tests were left out)" if left_out else ""
            sys.stdout.write(f"\n{'held  ' if record['held'] else 'FAILED'} {row}: {told}")
        sys.stdout.write("\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Rows(), "rows of faults")
