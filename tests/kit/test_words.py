"""The filter of other people's warnings lets everything of ours through."""

from kit import words


def test_only_other_peoples_warnings_are_left_out() -> None:
    own = f"{words.ROOT}/sslx/cli.py:3: FutureWarning: old\n  old()\nerror: expected 1, got 2\nTraceback\n  File\n"
    foreign = "/x/torch/a.py:9: UserWarning: TF32 acceleration\n  torch.f()\n/x/b.py:1: DeprecationWarning: c\n"
    foreign += "[W1129 00:00:00.123 ProcessGroup.cpp:12] Warning: slow\n[rank1]:[W1129 00:00:00.1 a.cpp:1] x\n"
    assert words.own(foreign + own) == own
    assert words.own(own + foreign) == own
