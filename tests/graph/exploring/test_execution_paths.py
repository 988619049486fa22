"""Other paths through a model's code."""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse.cases import cases
from torchfuse.graph import exploring
from torchfuse.graph.exploring import explore
from torchfuse.graph.recording import Recorder, record


def paths_of(forward):
    """Return what exploring finds of a conv and a batch norm with this forward."""
    torch.manual_seed(0)
    model = trained(type("Model", (ConvBn,), {"forward": forward})(), IMAGE)
    given = cases(IMAGE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = Recorder(model)
    paths = explore(recorder, given, recorder.record(given))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return paths


def called(path):
    return [call.kind for call in path.graph.calls if call.kind in ("conv", "batch_norm", "relu")]


def test_code_that_compares_nothing_has_no_other_path():
    def forward(self, x):
        n, c, h, w = x.shape
        return self.bn(self.conv(x)).view(n, c, h * w)

    paths = paths_of(forward)
    assert (paths.paths, paths.sites, paths.lost) == ((), 0, None)


def test_each_side_of_a_branch_on_a_size_is_a_path():
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.shape[-1] > 3 else y

    paths = paths_of(forward)
    assert [called(path) for path in paths.paths] == [["conv"]]
    assert paths.paths[0].left_at.startswith("test_execution_paths.py:")
    assert paths.lost is None


def test_a_truth_and_a_value_of_a_tensor_are_branches_too():
    def forward(self, x):
        y = self.conv(x)
        if (x > 1e6).any():
            return y
        return F.relu(y) if x.max().item() > 1e6 else self.bn(y)

    paths = paths_of(forward)
    assert sorted(called(path) for path in paths.paths) == [["conv"], ["conv", "relu"]]


def test_branches_that_change_nothing_alone_are_combined():
    def forward(self, x):
        wide, high = x.shape[-1] > 3, x.shape[-2] > 3
        y = self.conv(x)
        return self.bn(y) if wide or high else y

    paths = paths_of(forward)
    assert ["conv"] in [called(path) for path in paths.paths]


def test_a_branch_that_only_another_path_comes_to_is_explored():
    def forward(self, x):
        y = self.conv(x)
        if x.shape[-1] < 3:
            return y if x.shape[-2] < 3 else F.relu(y)
        return self.bn(y)

    paths = paths_of(forward)
    assert sorted(called(path) for path in paths.paths) == [["conv"], ["conv", "relu"]]


def test_one_of_several_visits_of_a_branch_is_answered_otherwise_alone():
    def forward(self, x):
        for least in (3, 2):
            if x.shape[-1] > least:
                x = F.relu(x)
        return self.bn(self.conv(x))

    found = [called(path) for path in paths_of(forward).paths]
    assert ["relu", "conv", "batch_norm"] in found
    assert ["conv", "batch_norm"] in found


def test_another_size_that_takes_another_path_is_one():
    def forward(self, x):
        for _ in range(x.shape[-1] // 8):  # which asks nothing that can be seen
            x = F.relu(x)
        return self.bn(self.conv(x))

    paths = paths_of(forward)
    assert [(called(path), path.left_at) for path in paths.paths] == [
        (["conv", "batch_norm"], "forward(1×4×4×4)")
    ]


def test_a_check_that_raises_at_once_is_the_end_of_a_path():
    def forward(self, x):
        if x.shape[-1] < 3:
            raise ValueError(f"too narrow: {x.shape[-1]}")
        assert x.shape[-2] > 2
        torch._assert(x.shape[0] > 0, "empty")
        return self.bn(self.conv(x))

    paths = paths_of(forward)
    assert (paths.paths, paths.sites, paths.lost) == ((), 4, None)  # one is the text


def test_an_error_later_may_be_for_the_false_answer_so_that_the_path_is_lost():
    def forward(self, x):
        if x.shape[-1] >= 16:
            x = x.view(x.shape[0], 4, -1, x.shape[-1] // 16, 16)
            return self.conv(x.sum(2))
        return self.bn(self.conv(x))

    assert "ends in an error" in paths_of(forward).lost


def test_a_plain_number_is_lost_and_said_where():
    def forward(self, x):
        wide = int(x.shape[-1]) > 3
        y = self.conv(x)
        return self.bn(y) if wide else y

    assert paths_of(forward).lost.startswith(
        "a size or value is turned into a plain number (test_e"
    )


def test_a_loop_that_a_false_answer_never_ends_is_lost():
    def forward(self, x):
        width = x.shape[-1]
        while width > 2:
            width = width // 2 if width > 4 else width - 1
        return self.bn(self.conv(x))

    assert paths_of(forward).lost is not None


def test_a_loop_that_a_false_answer_elsewhere_never_ends_is_lost():
    def forward(self, x):
        step, top = 4, 0
        if x.shape[-1] > 1024:
            step = x.shape[-1] // 1024
        while top < x.shape[-1]:
            top += step
        return self.bn(self.conv(x))

    assert "may not end" in paths_of(forward).lost


def test_a_loop_that_asks_nothing_ends_too():
    def forward(self, x):
        wide, count = x.shape[-1] > 2, 0
        while count < 3:
            x = x + 1
            count += 1 if wide else 0
        return self.bn(self.conv(x))

    assert "without an end" in paths_of(forward).lost


def test_an_error_is_no_loss_where_another_size_takes_that_path():
    def forward(self, x):  # where an even size is padded too, it cannot be halved
        if x.shape[-1] % 2 == 1:
            x = F.pad(x, (0, 1))
        return self.bn(self.conv(x.unflatten(-1, (-1, 2)).flatten(-2)))

    assert paths_of(forward).lost is None


def test_much_more_than_in_the_true_runs_is_not_computed():
    def forward(self, x):
        kept = x if x.shape[-1] > 2 else x.repeat(1, 1, 60, 60)
        return self.bn(self.conv(kept.relu()))

    assert "`relu` much more" in paths_of(forward).lost


def test_a_check_that_only_a_false_answer_fails_is_passed():
    def forward(self, x):
        y = self.conv(x)
        if x.shape[-1] > 16:
            assert x.shape[-1] // 16 > 0
            return y
        return self.bn(y)

    assert ["conv"] in [called(path) for path in paths_of(forward).paths]


def test_a_run_that_failed_is_no_evidence_of_a_path():
    def forward(self, x):
        if x.shape[-1] % 8 == 0:
            return self.bn(self.conv(x))
        return self.conv(x.view(x.shape[0], 4, x.shape[-1] // 6 * 6, x.shape[-1]))

    assert "ends in an error" in paths_of(forward).lost


def test_a_comparison_of_sizes_comes_out_true_from_any_of_them_on():
    def forward(self, x):
        y = self.conv(x)
        return y if x.shape == torch.Size([2, 4, 32, 32]) else self.bn(y)

    assert ["conv"] in [called(path) for path in paths_of(forward).paths]


def test_a_long_search_in_a_container_is_lost():
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.shape[-1] in range(20) else y

    assert "looked up in a container" in paths_of(forward).lost


def test_what_other_paths_print_log_and_ask_for_reaches_nobody(capfd, caplog):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.isnan().any():
            print("NaN")
            logging.getLogger("model").error("NaN")
            input("Go on?")
        return y

    paths = paths_of(forward)
    assert paths.sites == 1
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")
    logging.getLogger("model").error("heard again")
    assert "heard again" in caplog.text


def test_state_that_a_run_changes_is_put_back():
    model = trained(ConvBn(), IMAGE)
    model.seen = []

    def forward(x):
        model.seen.append(x.shape[-1])
        return model.bn(model.conv(x))

    model.forward = forward
    given = cases(IMAGE)
    recorder = Recorder(model)
    explore(recorder, given, recorder.record(given))
    assert model.seen == []


class Twice(nn.Module):
    def forward(self, x):
        return x if x.shape[0] > 3 else -x


def test_each_case_is_explored():
    model = Twice()
    given = cases([torch.ones(2, 1), torch.ones(8, 1)])
    recorder = Recorder(model)
    assert len(explore(recorder, given, recorder.record(given)).paths) == 2


class FrozenNorm(nn.Module):
    """A batch norm of several calls, which the recording makes one of."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)


def test_what_is_called_lies_between_the_calls_that_were_recorded():
    def seen(x):
        return x

    class Model(ConvBn):
        def __init__(self):
            super().__init__()
            self.first, self.frozen, self.mask = nn.Conv2d(4, 8, 1), FrozenNorm(), None

        def forward(self, x):
            if self.mask is None:  # a call that the first run makes, and no other
                self.mask = torch.ones_like(x)
            return self.bn(self.conv(seen(self.frozen(self.first(x * self.mask))[:, :4])))

    model = Model().eval()
    given = cases(IMAGE)
    recorded = record(model, given)
    model.mask = torch.ones_like(IMAGE)
    places = [
        place
        for place, code in exploring.called(Recorder(model), given, recorded)
        if code is seen.__code__
    ]
    assert places == [call.index for call in recorded.calls if call.module_path == "conv"]
