"""Several models or optimizers in one tracker: each steps alone, and what is recorded goes by its name."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytracker import GradientNoiseScale, Run, Tracker, diagnose, load_run
from pytracker.errors import InvalidTypeError, InvalidValueError, ParameterError
from pytracker.history import PlayerHistory

LR = {"G": 0.01, "D": 0.02}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"G": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "D": nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))}


def optimizers(players: dict[str, nn.Module], kind=torch.optim.SGD, **options) -> dict[str, torch.optim.Optimizer]:
    return {name: kind(model.parameters(), lr=LR[name], **options) for name, model in players.items()}


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def norm(*tensors: torch.Tensor) -> float:
    return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors))


def norm_of(*players: nn.Module) -> float:
    return norm(*(parameter.grad for model in players for parameter in model.parameters()))


@settings(deadline=None, max_examples=25)
@given(turns=st.lists(st.sampled_from(["G", "D", None]), min_size=1, max_size=25), every=st.integers(1, 9))
def test_each_step_is_recorded_of_those_who_take_it(turns, every):
    players = models()
    expected: dict[str, list[tuple[int, float]]] = {}
    with Tracker(players, optimizers(players), every=every, diagnosis=None) as tracker:
        for step, turn in enumerate(turns):
            for index, model in enumerate(players.values()):
                gradients(model, 2 * step + index)
            tracker.step(only=turn, loss=float(step))
            for name, model in players.items():
                if turn in (name, None):
                    expected.setdefault(f"{name}/grad_norm", []).append((step, norm_of(model)))
                    expected.setdefault(f"{name}/lr", []).append((step, LR[name]))
            expected.setdefault(f"{turn}/loss" if turn else "loss", []).append((step, float(step)))
            if turn is None:
                expected.setdefault("grad_norm", []).append((step, norm_of(*players.values())))
    history = tracker.history
    for name, points in expected.items():
        assert history[name].steps.tolist() == [step for step, _ in points], name
        assert history[name].values == pytest.approx([value for _, value in points], rel=1e-12), name
    assert {name for name in history if not name.split("/")[-1].startswith("grad_")} == {
        name for name in expected if not name.endswith("grad_norm")
    }
    assert ("grad_norm" in history) == (None in turns)


@settings(deadline=None, max_examples=15)
@given(turns=st.lists(st.sampled_from(["G", "D", None]), min_size=1, max_size=12))
def test_a_gradient_is_missing_only_where_its_player_steps_and_has_none(turns):
    players = models()
    with Tracker(players, every=100, diagnosis=None) as tracker:
        for step, turn in enumerate(turns):
            gradients(players["G"], step)
            gradients(players["D"], step)
            players["D"][1].bias.grad = None
            tracker.step(only=turn)
    parameters = tracker.history.parameters
    missing = dict(zip(parameters.names, parameters.field("missing")[-1].tolist(), strict=True))
    assert missing.pop("D/1.bias") == sum(turn in ("D", None) for turn in turns)
    assert set(missing.values()) == {0.0}


def test_the_steps_of_a_player_read_no_gradient_of_the_others():
    players = models()
    for model in players.values():
        gradients(model, 1)
    players["G"][0].weight.grad.fill_(math.nan)
    with Tracker(players, diagnosis=None) as tracker:
        tracker.step(only="D")
    assert tracker.history["D/grad_nonfinite"][:] == [0.0]
    assert tracker.history["D/grad_norm"][0] == pytest.approx(norm_of(players["D"]), rel=1e-12)


def test_what_two_players_share_counts_for_both():
    shared = nn.Linear(2, 2)
    players = {"actor": nn.Sequential(shared, nn.Linear(2, 3)), "critic": nn.Sequential(shared, nn.Linear(2, 1))}
    gradients(players["actor"], 1)
    gradients(players["critic"], 2)
    with Tracker(players, diagnosis=None) as tracker:
        tracker.step()
        tracker.step(only="actor")
        tracker.step(only="critic")
    history = tracker.history
    assert history["critic/grad_norm"][:] == pytest.approx([norm_of(players["critic"])] * 2, rel=1e-12)
    assert history["actor/grad_norm"][:] == pytest.approx([norm_of(players["actor"])] * 2, rel=1e-12)
    everything = norm_of(players["actor"], players["critic"][1])
    assert history["grad_norm"][:] == pytest.approx([everything], rel=1e-12)
    assert "actor/0.weight" in history.parameters.names
    assert "critic/0.weight" not in history.parameters.names


def test_several_optimizers_of_one_model_are_players():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    its = {"muon": torch.optim.SGD(matrices, lr=0.1), "adam": torch.optim.Adam([{"params": [v]} for v in vectors])}
    gradients(model, 3)
    with Tracker(model, optimizer=its, diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        tracker.step(only="adam")
    history = tracker.history
    assert history["grad_norm"][:] == pytest.approx([norm_of(model)], rel=1e-12)
    assert history["muon/grad_norm"][:] == pytest.approx([norm(*(p.grad for p in matrices))], rel=1e-12)
    assert history["adam/grad_norm"][:] == pytest.approx([norm(*(p.grad for p in vectors))] * 2, rel=1e-12)
    assert [info.group for info in history.parameters.infos] == ["muon/0", "adam/0", "muon/0", "adam/1"]
    assert history.parameters.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert {name for name in history if "lr" in name} == {"muon/lr", "adam/lr", "adam/lr/0", "adam/lr/1"}
    assert history["muon/lr"].steps.tolist() == [0]
    assert history["adam/lr"].steps.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [False, True])
def test_a_clip_goes_by_the_norm_of_the_player_alone_and_trains_as_torch_s_does(kind, fused):
    ours, theirs = models(), models()
    our_optimizers, their_optimizers = optimizers(ours, kind, fused=fused), optimizers(theirs, kind)
    with Tracker(ours, our_optimizers, diagnosis=None) as tracker:
        for step in range(30):
            turn = "GD"[step % 2]
            for players in (ours, theirs):
                gradients(players["G"], 2 * step)
                gradients(players["D"], 2 * step + 1)
            tracker.step(only=turn, clip=0.7 if turn == "D" else 2.0)
            our_optimizers[turn].step()
            nn.utils.clip_grad_norm_(theirs[turn].parameters(), 0.7 if turn == "D" else 2.0)
            their_optimizers[turn].step()
    for name, model in ours.items():
        for own, other in zip(model.parameters(), theirs[name].parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    assert {name for name in tracker.history if "clip" in name} == {"D/clip_factor", "G/clip_factor"}
    expected = 0.7 / (np.array(tracker.history["D/grad_norm"][:]) + 1e-6)
    assert tracker.history["D/clip_factor"][:] == pytest.approx(np.minimum(expected, 1.0), rel=1e-9)


def test_clip_after_a_step_is_by_that_step_s_player():
    players = models()
    with Tracker(players, diagnosis=None) as tracker:
        gradients(players["G"], 1)
        gradients(players["D"], 2)
        untouched = players["G"][0].weight.grad.clone()
        before = norm_of(players["D"])
        tracker.step(only="D")
        assert float(tracker.clip(0.5)) == pytest.approx(before, rel=1e-6)
        assert norm_of(players["D"]) == pytest.approx(0.5, rel=1e-5)
        assert torch.equal(players["G"][0].weight.grad, untouched)
    assert tracker.history["D/clip_factor"][0] == pytest.approx(0.5 / (before + 1e-6))


def test_a_step_of_all_is_clipped_by_the_norm_of_all():
    players = models()
    for index, model in enumerate(players.values()):
        gradients(model, index)
    before = norm_of(*players.values())
    with Tracker(players, optimizers(players, torch.optim.Adam, fused=True), diagnosis=None) as tracker:
        tracker.step(clip=1.0)
    assert norm_of(*players.values()) == pytest.approx(1.0, rel=1e-5)
    assert tracker.history["clip_factor"][0] == pytest.approx(1.0 / (before + 1e-6))


def test_micro_batches_of_players_are_kept_apart():
    players = models()
    for model in players.values():
        gradients(model, 5)
    with Tracker(players, diagnosis=None) as tracker:
        tracker.step(only="D", when=False, loss=1.0)
        tracker.step(only="G", when=False, loss=10.0)
        tracker.step(only="D", loss=3.0)
        tracker.step(only="G", loss=30.0)
    assert tracker.history["D/loss"][:] == [2.0]
    assert tracker.history["G/loss"][:] == [20.0]


def test_a_scaler_s_scale_is_taken_out_until_it_has_unscaled_that_player():
    players = models()
    its = optimizers(players)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Tracker(players, its, grad_scaler=scaler, diagnosis=None) as tracker:
        for turn in ("D", "G"):
            model = players[turn]
            scaler.scale(model(torch.ones(2, 3 if turn == "G" else 2)).sum()).backward()
            expected = norm_of(model) / 8.0
            if turn == "G":
                scaler.unscale_(its["G"])
            tracker.step(only=turn)
            assert tracker.steps
            tracker.flush()
            assert tracker.history[f"{turn}/grad_norm"][-1] == pytest.approx(expected, rel=1e-7)
        with pytest.raises(InvalidValueError, match="unscale_ for all"):
            tracker.step()  # G's are unscaled, and D's are not


def test_gradients_are_given_for_the_player_s_parameters():
    players = models()
    found = [torch.full_like(parameter, 2.0) for parameter in players["D"].parameters()]
    with Tracker(players, diagnosis=None) as tracker:
        tracker.step(only="D", gradients=found)
        with pytest.raises(InvalidValueError, match="in their order, or None where it has none: 4"):
            tracker.step(only="D", gradients=found * 2)
    assert tracker.history["D/grad_norm"][0] == pytest.approx(norm(*found), rel=1e-12)


def test_a_checkpoint_goes_on_without_a_lost_or_doubled_row(tmp_path):
    def steps(tracker: Tracker, players: dict[str, nn.Module], first: int, last: int) -> None:
        for step in range(first, last):
            turn = "GD"[step % 2]
            gradients(players[turn], step)
            tracker.step(only=turn, loss=float(step), clip="zclip" if turn == "D" else None)

    players = models()
    with Tracker(players, optimizers(players), run=Run(tmp_path, name="gan")) as tracker:
        steps(tracker, players, 0, 70)
        state = tracker.state_dict()
        steps(tracker, players, 70, 90)
    players = models()
    with Tracker(players, optimizers(players), run=Run(tmp_path, name="gan", resume=True)) as tracker:
        tracker.load_state_dict(state)
        steps(tracker, players, 70, 100)
    resumed = load_run(tmp_path / "gan").history
    whole = models()
    with Tracker(whole, optimizers(whole)) as tracker:
        steps(tracker, whole, 0, 100)
    for name, series in tracker.history.items():
        assert resumed[name].steps.tolist() == series.steps.tolist(), name
        assert np.array_equal(resumed[name].values, series.values), name


def train(turns: str, losses: dict[str, list[float]], **options) -> Tracker:
    players = models()
    left = {name: iter(values) for name, values in losses.items()}
    with Tracker(players, optimizers(players), every=10, on_finding=lambda finding: None, **options) as tracker:
        for step, turn in enumerate(turns):
            gradients(players[turn], step)
            tracker.step(only=turn, loss=next(left[turn]))
    return tracker


def test_the_rules_judge_each_player_by_its_own_steps(tmp_path):
    turns = "GD" * 120
    noise = np.random.default_rng(0).normal(size=120)
    tracker = train(turns, {"G": (2.0 + noise).tolist(), "D": [0.7] * 120}, run=Run(tmp_path, name="gan"))
    found = {finding.key: finding for finding in tracker.findings if finding.severity != "info"}
    assert set(found) == {"D/constant"}
    assert found["D/constant"].player == "D"
    assert found["D/constant"].rule == "constant"
    assert str(found["D/constant"]).startswith("critical: D/constant, steps 1 to 239: the loss is exactly 0.7")
    finished = load_run(tmp_path / "gan")
    assert [each.to_dict() for each in diagnose(finished.history)] == [each.to_dict() for each in tracker.findings]
    assert [each["key"] for each in finished.history.findings if each["severity"] == "critical"] == ["D/constant"]


def test_a_player_whose_gradients_are_zero_is_named_with_its_parameters():
    players = models()
    with Tracker(players, optimizers(players), every=10, on_finding=lambda finding: None) as tracker:
        for step in range(240):
            turn = "GD"[step % 2]
            gradients(players[turn], step)
            if turn == "D":
                players["D"][0].weight.grad.zero_()
            tracker.step(only=turn, loss=1.0 / (step + 1))
    (found,) = [finding for finding in tracker.findings if finding.rule == "dead_parameter"]
    assert found.key == "D/dead_parameter"
    assert found.parameters == ("D/0.weight",)


def test_all_together_are_judged_as_one_where_they_step_together():
    players = models()
    with Tracker(players, optimizers(players), every=10, on_finding=lambda finding: None) as tracker:
        for step in range(120):
            for index, model in enumerate(players.values()):
                gradients(model, 2 * step + index)
            tracker.step(loss=0.7)
    assert [finding.key for finding in tracker.findings if finding.severity == "critical"] == ["constant"]


def test_a_player_s_history_reads_as_if_it_had_trained_alone():
    turns = "GGD" * 40
    together = train(turns, {"G": list(np.arange(80.0)), "D": list(np.arange(40.0))}, diagnosis=None).history
    alone = PlayerHistory(together, "D")
    assert alone["loss"][:] == list(np.arange(40.0))
    assert "G/loss" not in alone
    assert alone.parameters.names == ["D/0.weight", "D/0.bias", "D/1.weight", "D/1.bias"]
    steps, norms = alone.parameters.norms()
    assert steps.tolist() == list(range(2, 120, 3))
    assert not np.isnan(norms).any()
    assert [info.group for info in alone.parameters.infos] == ["0"] * 4
    with pytest.raises(InvalidValueError, match="no player 'E'; there are G, D"):
        PlayerHistory(together, "E")


def test_a_player_that_pauses_has_no_intervals_of_the_pause():
    history = train("D" * 20 + "G" * 40 + "D" * 20, {"G": [1.0] * 40, "D": [1.0] * 40}, diagnosis=None).history
    alone = PlayerHistory(history, "D").parameters
    assert alone.first_step.tolist() == [0, 10, 60, 70]
    assert not np.isnan(alone.field("norm_mean")).any()


@pytest.mark.parametrize(
    ("model", "optimizer", "kind", "message"),
    [
        ({}, None, InvalidValueError, "model is an empty dictionary"),
        ({"a/b": nn.Linear(1, 1)}, None, InvalidValueError, "a player is called 'a/b'"),
        ({"": nn.Linear(1, 1)}, None, InvalidValueError, "a player is called ''"),
        ({"lr": nn.Linear(1, 1)}, None, InvalidValueError, "a player is called 'lr'"),
        ({1: nn.Linear(1, 1)}, None, InvalidTypeError, "a name in model is 1"),
        ({"G": nn.Linear(1, 1)}, {"D": None}, InvalidValueError, "optimizer has 'D', and the players are 'G'"),
        ({"G": nn.Linear(1, 1)}, {"G": 3}, InvalidTypeError, r"optimizer\['G'\] is 3"),
        ({"G": nn.ReLU()}, None, InvalidValueError, "player 'G' has no parameters"),
        (nn.Linear(1, 1), {"a": torch.optim.SGD([torch.ones(1)], 1.0)}, InvalidValueError, "player 'a' has no param"),
        ({"G": nn.Linear(1, 1)}, torch.optim.SGD([torch.ones(1)], 1.0), InvalidTypeError, "optimizer is one SGD for"),
        ({"G": 3}, None, InvalidTypeError, "is 3"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(model, optimizer, kind, message):
    with pytest.raises(kind, match=message):
        Tracker(model, optimizer=optimizer)


def test_the_noise_scale_of_players_is_refused():
    players = models()
    scale = object.__new__(GradientNoiseScale)
    with pytest.raises(InvalidValueError, match="there are players"):
        Tracker(players, noise_scale=scale)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x * 0)


def test_where_nan_began_is_found_in_the_player_that_made_it():
    players = models()
    players["D"] = nn.Sequential(nn.Linear(2, 2), Broken(), nn.Linear(2, 1))
    with Tracker(players, every=2, on_nonfinite="locate", on_finding=lambda finding: None) as tracker:
        for step in range(8):
            turn = "DG"[step % 2]
            players[turn].zero_grad()
            players[turn](torch.ones(1, 3 if turn == "G" else 2)).sum().backward()
            tracker.step(only=turn)
    told = {finding.key: finding for finding in tracker.findings}
    assert "the output of 'D.1' (Broken) has 2 Inf" in told["nonfinite_origin"].evidence
    assert told["D/gradient_nonfinite"].parameters[0] == "D/2.weight"


def test_who_is_no_player_is_refused_and_nothing_is_lost():
    players = models()
    gradients(players["G"], 1)
    with Tracker(players, diagnosis=None) as tracker:
        tracker.step(only="G")
        with pytest.raises(InvalidValueError, match="only is 'E', and the players are 'G', 'D'"):
            tracker.step(only="E")
        with pytest.raises(InvalidValueError, match="'G/grad_norm' is recorded by pytracker itself"):
            tracker.step(only="G", grad_norm=3.0)
    assert tracker.history["G/grad_norm"].steps.tolist() == [0]
    its = torch.optim.SGD([{"params": [each]} for each in players["G"].parameters()], lr=0.1)
    with Tracker(players, {"G": its}, diagnosis=None) as tracker:
        with pytest.raises(InvalidValueError, match="'G/lr' is recorded by pytracker itself"):
            tracker.step(only="G", lr=0.3)
        tracker.step(only="D", lr=0.3)  # who has no optimizer may say it
    assert tracker.history["D/lr"][:] == [0.3]
    with Tracker(nn.Linear(1, 1), diagnosis=None) as tracker, pytest.raises(InvalidValueError, match="has no players"):
        tracker.step(only="G")


def test_a_player_without_gradients_in_its_step_is_told():
    players = models()
    gradients(players["G"], 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracker(players, diagnosis=None) as tracker:
            tracker.step(only="G")
            tracker.step(only="D")
    assert math.isnan(tracker.history["D/grad_norm"][0])
    assert any("no parameter had a gradient in step 1" in str(each.message) for each in caught)


def test_the_means_of_an_epoch_are_each_player_s():
    players = models()
    with Tracker(players, diagnosis=None) as tracker:
        for step in range(6):
            turn = "GD"[step % 2]
            gradients(players[turn], step)
            tracker.step(only=turn, loss=float(step), n=1 + step)
        means = tracker.epoch(fid=12.0)
    assert means["G/loss"] == pytest.approx((0 * 1 + 2 * 3 + 4 * 5) / 9)
    assert means["D/loss"] == pytest.approx((1 * 2 + 3 * 4 + 5 * 6) / 12)
    assert means["fid"] == 12.0
    assert tracker.history["fid"][:] == [12.0]


def test_a_model_of_a_player_that_has_changed_is_told_and_one_that_has_not_is_not():
    players = models()
    with Tracker(players, every=1, diagnosis=None) as tracker:
        gradients(players["G"], 1)
        tracker.step(only="G")
        players["G"][1] = nn.Sequential(players["G"][1])
        with pytest.raises(ParameterError, match=r"new: 'G/1.0.weight'.*gone: 'G/1.weight'"):
            tracker.step(only="G")
    players = models()
    with Tracker(players, every=1, diagnosis=None) as tracker:
        players["D"].add_module("act", nn.ReLU())
        gradients(players["D"], 1)
        tracker.step(only="D")


def test_what_a_stranger_has_written_of_players_is_no_error():
    history = train("GD" * 20, {"G": [1.0] * 20, "D": [1.0] * 20}, diagnosis=None).history
    history.meta |= {"players": {"G": 5, "D": {}}, "frozen": [[0, 10**15], ["a", "b"], 7]}
    assert PlayerHistory(history, "G").meta["frozen"] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert isinstance(diagnose(history), list)
