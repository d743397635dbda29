"""The field's bugs of distributed training, and the tests that would catch each here.

The list is of issues and pull requests in other frameworks (solo-learn, lightly, VISSL, stable-pretraining, ...).
``test_each_is_caught_by_tests_that_exist`` fails where one of these tests is renamed or deleted.
"""

import pytest

import faults

LOSSES = (
    "losses/test_nt_xent.py::test_ranks_give_the_full_batch_loss_and_gradients",
    "methods/test_barlow_twins.py::test_ranks_give_the_full_batch_loss_and_gradient",
    "methods/test_vicreg.py::test_ranks_give_the_full_batch_loss_and_gradient",
    "methods/test_siamese.py::test_ranks_give_equation_4_over_the_whole_batchs_pairs",
    "methods/test_supcon.py::test_ranks_give_l_out_over_the_whole_batch",
    "methods/test_mocov3.py::test_ranks_give_the_full_batch_loss_and_gradient",
    "methods/test_swav.py::test_ranks_give_the_full_batch_loss_and_gradient",
    "methods/test_dino.py::test_the_center_is_the_moving_average_over_all_ranks",
)
"""Loss and gradients of 1 to 4 real ranks against one process with the whole batch, in fp64."""
VERIFY = "train/test_verify.py::test_every_method_is_the_same_at_any_world_size"

BUGS: dict[str, tuple[str, ...]] = {
    "lightly #1528: the gather's backward does not sum the gradients of all ranks": (
        "test_distributed.py::test_gathers",
        *LOSSES,
    ),
    "lightly #1977: Barlow Twins' gradient is a W-th of the full batch's": (
        "methods/test_barlow_twins.py::test_ranks_give_the_full_batch_loss_and_gradient",
        "train/test_verify.py::test_a_gradient_of_one_wth_is_found",
    ),
    "lightly #1920: the same in a loss of the batch's statistics": (
        "methods/test_vicreg.py::test_ranks_give_the_full_batch_loss_and_gradient",
        "test_distributed.py::test_a_sum_with_a_gradient",
    ),
    "lightly #1176, #1177: wrong positives by rank; gathers that gloo cannot do": (
        "losses/test_nt_xent.py::test_own_columns_first_and_the_others_after_are_the_definition",
        "losses/test_nt_xent.py::test_a_group_of_ranks",
        VERIFY,
    ),
    "lightly #1018: a queue holds one rank's samples": (
        "methods/test_swav.py::test_the_queue_holds_all_ranks_samples_in_their_order_and_makes_the_codes_once_full",
        VERIFY,
    ),
    "stable-pretraining #409: what the gather returns is dropped": (*LOSSES, "test_distributed.py::test_gathers"),
    "stable-pretraining #432: the projector's batch norm sees one view at a time": (
        "methods/test_contract.py::test_norms_see_all_views_of_a_size_together",
        "methods/test_simclr.py::test_the_views_go_through_as_one_batch_and_come_out_in_order",
    ),
    "VISSL #123, #230: SimCLR's and Barlow Twins' gradients are wrong by a factor at W > 1": (
        *LOSSES,
        "test_parallel.py::test_wrap_averages_gradients_and_starts_equal",
        VERIFY,
    ),
    "Spijkervet/SimCLR #30, #37: several GPUs change nothing, the loss stays at ln(N)": (
        "methods/test_contract.py::test_it_learns_a_fixed_batch",
        "train/test_equivalence.py::test_equal_in_fp64_for_many_steps",
    ),
    "sthalles/SimCLR #59, bolts #179: negatives of this rank only": (
        "losses/test_nt_xent.py::test_ranks_give_the_full_batch_loss_and_gradients",
        "losses/test_nt_xent.py::test_one_ranks_nan_reaches_the_loss_of_all",
    ),
    "solo-learn #253, #229: the loss is lower on several GPUs; NNCLR's neighbours are of this rank only": (
        "train/test_equivalence.py::test_equal_in_fp64_for_many_steps",
        VERIFY,
    ),
    "solo-learn #262: lower accuracy on several GPUs, another learning rate schedule": (
        "train/test_build.py::test_steps_and_learning_rates_are_functions_of_the_global_batch",
        "data/test_loader.py::test_ranks_together_make_the_batches_of_one",
        VERIFY,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_is_caught_by_tests_that_exist(bug: str):
    for test in BUGS[bug]:
        file, name = test.split("::")
        assert name.startswith("test_")
        assert name in faults.functions(file), test
