"""Training: losses by hand, recipes, and a curve that no break changes."""

import csv
import os
import re
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn

from qsmpipe.cli import main
from qsmpipe.cli.errors import Exit
from qsmpipe.cli.train import EVENTS
from qsmpipe.nets.architectures import ARCHITECTURES, build
from qsmpipe.nets.cards import load
from qsmpipe.nets.contract import Contract
from qsmpipe.nets.recipes import recipe_names
from qsmpipe.nets.training.export import EXPORTED, export
from qsmpipe.nets.training.losses import LOSSES, gradient_penalty, scale_invariant, si_qsm
from qsmpipe.nets.training.muon import Muon, orthogonalised
from qsmpipe.nets.training.recipe import Recipe, read_recipe
from qsmpipe.nets.training.trainer import BEST, LAST, Trainer
from qsmpipe.tables import from_table, merged

TINY: dict[str, Any] = {
    "network": {"architecture": "unet", "options": {"width": 2, "depth": 1}},
    "contract": {"scale": 10.0, "output_scale": 10.0},
    "data": {
        "source": "shapes",
        "options": {"shape": [16, 16, 16], "rim": [1, 2], "count": [3, 6]},
        "augmentation": {},
        "measurement": {"snr": [50.0, 200.0]},
    },
    "training": {
        "loss": "scale-invariant", "learning_rate": 1e-2, "batch": 2, "steps": 6,
        "precision": "float32", "validate_every": 2, "validation_samples": 3,
    },
}  # fmt: skip
CRITIC: dict[str, Any] = {
    "network": {"architecture": "qsmgan", "options": {"width": 2, "depth": 2, "crop": 8}},
    "contract": {"squashed": True},
    "data": {"options": {"shape": [32, 32, 32]}},
    "adversary": {"alone": 2, "updates": 2, "width": 2},
    "training": {"steps": 3, "batch": 1, "loss": "absolute"},
}
MUON: dict[str, Any] = {"training": {"optimizer": "muon", "warmup": 2, "cooldown": 0.5}}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(**changes: Any) -> Recipe:
    return from_table(Recipe, merged(TINY, changes), "the recipe")


def trainer(folder: Path, **changes: Any) -> Trainer:
    made = recipe(**changes)
    seed = made.training.seed
    return Trainer(
        made,
        made.data.samples(seed=seed, device="cpu"),
        made.data.samples(seed=seed + 1, device="cpu"),
        folder,
    )


def vector(network: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


def parameters(network: nn.Module) -> Tensor:
    """Without the running means of batch normalisation."""
    return torch.cat([value.detach().flatten() for value in network.parameters()])


def images(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 5, 6, 7, generator=torch.Generator().manual_seed(seed)).double()


# Contracts


@pytest.mark.parametrize(
    "contract", [Contract(), Contract(output_scale=-3), Contract(output_scale=10, squashed=True)]
)
def test_what_a_network_should_give_means_the_susceptibility(contract: Contract) -> None:
    chi = 0.05 * images()
    torch.testing.assert_close(contract.susceptibility(contract.target(chi)), chi)


def test_images_are_stacked_in_their_order_and_scaled() -> None:
    field, mask = images(), images(1) > 0
    stacked = Contract(channels=("mask", "field"), scale=-100).images(field=field, mask=mask)
    assert stacked.shape == (2, 2, 5, 6, 7)
    torch.testing.assert_close(stacked, torch.cat([mask.double(), -100 * field], dim=1))
    filtered = Contract(channels=("filtered phase",), scale=2)
    only = filtered.images(field=None, mask=mask, filtered=field)
    torch.testing.assert_close(only, 2 * field)


def test_what_is_missing_or_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="takes the filtered phase"):
        Contract(channels=("filtered phase",)).images(field=images(), mask=images() > 0)
    with pytest.raises(ValueError, match="field, mask, filtered phase"):
        Contract(channels=("magnitude",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale of 0"):
        Contract(scale=0.0)


# Losses


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_voxels_outside_the_mask_have_no_loss(loss: Any) -> None:
    output, target, mask = images(), images(1), images(2) > 0
    other = torch.where(mask, output, 100.0)
    assert loss(other, target, mask) == pytest.approx(loss(output, target, mask).item())
    assert loss(output, target, mask & ~mask) == 0
    smooth = torch.ones_like(target)
    assert loss(smooth, smooth, mask) == 0


def test_one_loss_does_not_see_the_amplitude() -> None:
    output, target, mask = images(), images(1), images(2) > 0
    factors = torch.tensor([0.1, 2.0]).double().view(2, 1, 1, 1, 1)
    expected = scale_invariant(output, target, mask)
    torch.testing.assert_close(scale_invariant(factors * output, factors * target, mask), expected)
    inside = target[0][mask[0]], output[0][mask[0]]
    alone = (inside[1] - inside[0]).square().mean() / inside[0].var(correction=0)
    torch.testing.assert_close(scale_invariant(output[:1], target[:1], mask[:1]), alone)


def test_the_loss_of_si_qsm_is_its_formula() -> None:
    output, target = images(batch=1), images(1, batch=1)
    mask = torch.ones_like(output, dtype=torch.bool)
    error, n = output - target, output.numel()
    variation = sum(output.diff(dim=axis).abs().sum() for axis in (2, 3, 4))
    expected = error.square().mean() + 0.5 * error.abs().mean() + 2 * variation / n
    torch.testing.assert_close(si_qsm(output, target, mask, beta=0.5, gamma=2.0), expected)


def test_the_gradient_penalty_of_a_plane_is_that_of_its_slope() -> None:
    slope = images(batch=1)

    class Plane(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return (slope * maps).flatten(1).sum(1)

    share = torch.tensor([0.2, 0.9]).double()
    found = gradient_penalty(Plane(), images(1), images(2), share)
    torch.testing.assert_close(found, (slope.norm() - 1) ** 2)


# Recipes


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_papers_fit_their_networks(name: str) -> None:
    made = read_recipe(name)
    assert made.about["paper"]
    with torch.device("meta"):
        network = build(made.network.architecture, made.network.options)
        assert network.channels == len(made.contract.channels)
        network.check(torch.empty(1, network.channels, *made.data.options["shape"]))


def test_every_network_has_a_recipe() -> None:
    trained = {read_recipe(name).network.architecture for name in recipe_names()}
    assert trained == set(ARCHITECTURES) - {"mesa-qsm"}  # that of Meta-QSM, by --config


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[network]\noptions = {width = 8}\n[training]\nsteps = 7\n")
    mine, paper = read_recipe("unet", config), read_recipe("unet")
    assert mine.network.options == {"width": 8}
    assert mine.training == replace(paper.training, steps=7)
    assert mine.data == paper.data
    config.write_text('[network]\narchitecture = "mesa-qsm"\n')
    assert read_recipe("meta-qsm", config).network.options == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstep = 3", "there is no 'step' in training; did you mean 'steps'"),
        ("[training]\nsteps = 0", "training.steps is 0: give a whole number above 0"),
        ("[training]\nsteps = 3.5", "training.steps is 3.5: give a whole number above 0"),
        ("[training]\nwarmup = -1", "training.warmup is -1: give a whole number of 0 or more"),
        ("[training]\ncooldown = 2", "cooldown is 2: give a number from 0 to 1"),
        ("[training]\nbetas = [0.9]", "entry 2 of training.betas is missing"),
        ("[training]\nbetas = [0.9, 1]", "training.betas is 1: give a number of 0 or more"),
        ("[training]\nclip = nan", "training.clip is nan: give a finite number above 0"),
        ('[training]\noptimizer = "sgd"',
         "give 'adam', 'rmsprop', or 'muon'"),
        ('[training]\nloss = "l1"', "training: loss is 'l1': give one of absolute"),
        ("training = 3", "training is 3: give a table"),
        ('[network]\narchitecture = "vnet"', "network: architecture is 'vnet': give one of unet"),
        ("[network]\noptions = {wdith = 8}", "network: there is no 'wdith' in options; did"),
        ("[network]\noptions = {width = 8.5}", "network: options.width is 8.5: give a whole"),
        ('[network]\noptions = {pooling = "mean"}', "give 'max' or 'average'"),
        ('[data]\nsource = "cats"', "data: source is 'cats': give one of shapes"),
        ("[data]\noptions = {shape = [64, 64]}", "entry 3 of options.shape is missing"),
        ("[data]\noptions = {heads = 3}", "there is no 'heads' in options"),
        ("[data.scans]\nzooms = [[1, 1], [1, 1], [1, true]]",
         "entry 2 of entry 3 of data.scans.zooms is true: give a number"),
        ("[contract]\nchannels = ['fields']", 'entry 1 of contract.channels is "fields": give'),
        ("[about]\npaper = 3", "about.paper is 3: give a text"),
        ("[training", "not a readable TOML file (Expected"),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as failure:
        read_recipe("unet", config)
    assert str(failure.value).startswith(f"{config}: ")
    with pytest.raises(ValueError, match="no recipe is called cats: give one of cpsi-net"):
        read_recipe("cats")


# Training


@pytest.mark.parametrize("changes", [{}, CRITIC, MUON], ids=["alone", "with-critic", "muon"])
@pytest.mark.parametrize("break_after", [1, 2])
def test_a_broken_training_goes_on_to_the_same_curve(
    changes: dict[str, Any], break_after: int, tmp_path: Path
) -> None:
    whole = trainer(tmp_path / "whole", **changes)
    assert whole.run()
    first = trainer(tmp_path / "broken", **changes)

    def kill(one: Trainer) -> None:
        if one.step == break_after:
            one.save(LAST)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(after_step=kill)
    second = trainer(tmp_path / "broken", **changes)
    second.resume(tmp_path / "broken" / LAST)
    assert second.step == break_after
    assert second.run()
    same = [row._replace(seconds=0) for row in whole.curve]
    assert [row._replace(seconds=0) for row in second.curve] == same
    assert torch.equal(vector(whole.network), vector(second.network))


def test_the_best_network_is_kept(tmp_path: Path) -> None:
    training = trainer(tmp_path, training={"steps": 8})
    training.run()
    best = min(training.curve, key=lambda row: row.nrmse)
    kept = trainer(tmp_path)
    kept.resume(tmp_path / BEST)
    assert kept.step == best.step
    assert kept.validate()[0] == pytest.approx(best.nrmse)


def test_frozen_statistics_are_kept(tmp_path: Path) -> None:
    def variance(one: Trainer) -> Tensor:
        return one.network.get_buffer("contracting.0.0.1.running_var").clone()

    one = trainer(tmp_path, training={"frozen_after": 2, "steps": 4})
    seen: list[Tensor] = []
    one.run(after_step=lambda t: seen.append(variance(t)))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])


def test_long_gradients_are_shortened(tmp_path: Path) -> None:
    """Adam's first step is as long as its rate for any gradient; what it remembers is not."""
    one = trainer(tmp_path, training={"clip": 1e-3, "steps": 1})
    one.run()
    squared = sum(float(s["exp_avg"].square().sum()) for s in one.optimizer.state.values())
    assert squared**0.5 == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_card_tells_what_a_network_was_trained_on(tmp_path: Path) -> None:
    scans = {"zooms": [[0.5, 1.0], [0.6, 0.9], [2.0, 4.0]], "alike": 2, "tilt": 20.0}
    one = trainer(tmp_path, data={"scans": scans}, about={"paper": "P", "licence": "MIT"})
    one.run()
    card = export(one.recipe, tmp_path)
    assert card.domain.zooms == ((0.5, 1.0), (0.5, 1.0), (2.0, 4.0))
    assert card.domain.tilt == 20.0
    assert (card.patch, card.halo, card.licence) == (96, 16, "MIT")
    assert card.about == {"paper": "P"}
    assert from_table(Recipe, {**card.recipe, "network": TINY["network"],
                               "contract": TINY["contract"]}, "the card") == replace(
        one.recipe, about={}
    )  # fmt: skip


def test_a_network_learns(tmp_path: Path) -> None:
    """A map of 0 has an error of 100 %, and the slope of a right one is 1."""
    training = trainer(
        tmp_path,
        network={"options": {"width": 8, "depth": 2}},
        data={
            "options": {"shape": [16, 16, 16], "count": [15, 25], "size": [1.5, 5.0]},
            "measurement": {"snr": [1e3, 1e3]},
        },
        training={"loss": "squared", "learning_rate": 3e-3, "steps": 80, "validate_every": 80},
    )
    assert training.validate()[0] > 95
    training.run()
    assert training.curve[-1].nrmse < 75
    assert training.curve[-1].slope > 0.4


def test_time_that_is_up_keeps_the_checkpoint(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    assert not training.run(max_hours=0.0)
    other = trainer(tmp_path)
    other.resume(tmp_path / LAST)
    assert torch.equal(vector(other.network), vector(training.network))
    assert other.run()


def test_the_critic_learns_alone_first(tmp_path: Path) -> None:
    training = trainer(tmp_path, **CRITIC)
    assert training.critic is not None
    before = parameters(training.network), vector(training.critic)

    def look(one: Trainer) -> None:
        assert one.critic is not None
        assert torch.equal(parameters(one.network), before[0]) == (one.step <= 2)
        assert not torch.equal(vector(one.critic), before[1])

    training.run(after_step=look)


def test_parameters_of_another_training_are_a_start(tmp_path: Path) -> None:
    first = trainer(tmp_path / "one")
    first.run()
    second = trainer(tmp_path / "two", training={"seed": 5})
    second.start_from(tmp_path / "one" / LAST)
    assert second.step == 0
    assert torch.equal(vector(second.network), vector(first.network))
    other = trainer(tmp_path / "three", network={"options": {"width": 3}})
    with pytest.raises(ValueError, match=r"last.pt: .* parameters do not fit UNet"):
        other.start_from(tmp_path / "one" / LAST)
    weights = tmp_path / "one" / EXPORTED
    export(first.recipe, tmp_path / "one")
    other = trainer(tmp_path / "four", training={"seed": 5})
    other.start_from(weights)
    first.resume(tmp_path / "one" / BEST)
    torch.testing.assert_close(vector(other.network), vector(first.network), rtol=1e-3, atol=1e-4)
    weights.write_bytes(b"none")
    with pytest.raises(ValueError, match="no safetensors file"):
        other.start_from(weights)


def test_meta_qsm_starts_from_mesa_qsm(tmp_path: Path) -> None:
    shape = {"data": {"options": {"shape": [16, 16, 16]}}}
    mesa = trainer(tmp_path / "mesa", **shape, network={
        "architecture": "mesa-qsm", "options": {"width": 2, "batch_norm": False},
    })  # fmt: skip
    meta = trainer(tmp_path / "meta", **shape, network={
        "architecture": "meta-qsm", "options": {"width": 2, "hidden": 2, "batch_norm": False},
    })  # fmt: skip
    mesa.save(LAST)
    meta.start_from(tmp_path / "mesa" / LAST)
    assert meta.validate() == pytest.approx(mesa.validate())
    meta.run()
    assert meta.validate() != pytest.approx(mesa.validate())


# How the loss is followed


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = recipe(training={"warmup": 2, "cooldown": 0.5, "steps": 8}).training
    rates = [schedule.rate(step) / schedule.learning_rate for step in range(8)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 40), (40, 6), (8, 8)):
        matrix = torch.randn(shape, generator=generator)
        made = orthogonalised(matrix)
        assert made.shape == shape
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        along = u.mT @ made @ v.mT  # in the singular vectors of the matrix
        assert 0.6 < along.diagonal().min() <= along.diagonal().max() < 1.25
        assert (along - torch.diag(along.diagonal())).abs().max() < 1e-4


def test_muon_is_adam_where_there_is_no_kernel() -> None:
    one, two = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    ours = Muon([one], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    oracle = torch.optim.Adam([two], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    for step in range(5):
        for parameter, optimizer in ((one, ours), (two, oracle)):
            optimizer.zero_grad()
            (parameter**2 * torch.tensor([1.0, step, 2.0])).sum().backward()
            optimizer.step()
    torch.testing.assert_close(one, two)


def test_muon_follows_what_the_gradient_hardly_sees() -> None:
    """Least squares of condition 1000: after as many steps as Adam far nearer."""
    u, v = (
        torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(n)))[0]
        for n in range(2)
    )
    system = u @ torch.diag(torch.logspace(0, -3, 8)) @ v
    errors = []
    for kind in (Muon, torch.optim.Adam):
        found = nn.Parameter(torch.zeros(8, 8))
        optimizer = kind([found], lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            (found @ system - system).square().sum().backward()
            optimizer.step()
        errors.append(float((found - torch.eye(8)).detach().norm()))
    assert errors[0] < 0.5 * errors[1]


# The command line


TOML = """
[network]
options = { width = 2, depth = 1 }
[data]
options = { shape = [16, 16, 16], rim = [1, 2], count = [3, 6] }
[training]
steps = 4
batch = 1
validate_every = 2
validation_samples = 1
"""


def train(*words: str | Path) -> int:
    return main(["train", *map(str, words)])


def test_a_training_without_its_extra_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsmpipe.cli.train.find_spec", lambda name: None)
    assert train("unet", tmp_path / "out") == 69
    assert capsys.readouterr().err == (
        "qsmpipe: training writes its curves by tensorboardX, which is not installed: "
        "pip install 'qsmpipe[train]'\n"
    )
    assert not (tmp_path / "out").exists()


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by name and step; a record is a length and its CRC (12 bytes), an event, a CRC."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_the_command_trains_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "mine.toml", tmp_path / "out"
    config.write_text(TOML)
    assert train("unet", folder, "--config", config, "--max_hours", "1e-6") == 0
    assert "time is up at step 1" in capsys.readouterr().out
    assert train("unet", folder, "--config", config) == 0
    said = capsys.readouterr()
    assert "going on from step 1" in said.err
    assert "step 2 of 4: loss" in said.err
    assert "best at step" in said.out
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert events(folder / EVENTS)["nrmse"] == pytest.approx(
        {int(row["step"]): float(row["nrmse"]) for row in rows}, rel=1e-6
    )
    model = load(str(folder / EXPORTED), architecture="unet")
    assert model.card.domain.zooms == ((1.0, 1.0),) * 3
    assert model.card.training["validation"]["nrmse_percent"] == pytest.approx(
        min(float(row["nrmse"]) for row in rows), abs=0.01
    )
    assert f"--weights {folder / EXPORTED}" in said.out
    assert train("unet", tmp_path / "two", "--config", config, "--start", folder / BEST) == 0


def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "mine.toml", tmp_path / "out"
    config.write_text(TOML)
    assert train("unet", folder, "--config", config, "--max-hours", "1e-6") == 0
    config.write_text(TOML.replace("width = 2", "width = 3"))
    assert train("unet", folder, "--config", config) == Exit.USAGE
    assert "holds a training by another recipe" in capsys.readouterr().err
    config.write_text(TOML.replace("[16, 16, 16]", "[17, 16, 16]"))
    assert train("unet", tmp_path / "other", "--config", config) == Exit.USAGE
    assert "multiples of 2" in capsys.readouterr().err
    assert train("cats", folder) == Exit.USAGE
    assert "no recipe is called cats" in capsys.readouterr().err
    assert train("meta-qsm", folder) == Exit.USAGE
    assert "folder by --heads" in capsys.readouterr().err
    assert train("unet", folder, "--config", tmp_path / "none.toml") == Exit.USAGE
    assert "No such file" in capsys.readouterr().err


def test_an_interrupted_command_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "mine.toml", tmp_path / "out"
    config.write_text(TOML)
    follow = Trainer._follow

    def interrupted(self: Trainer, first: int) -> float:
        if first == 1:
            raise KeyboardInterrupt
        return follow(self, first)

    monkeypatch.setattr(Trainer, "_follow", interrupted)
    assert train("unet", folder, "--config", config) == Exit.INTERRUPTED
    monkeypatch.undo()
    assert train("unet", folder, "--config", config) == 0
    assert "going on from step 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "has", "expected"),
    [("auto", True, True), ("auto", False, False), ("bfloat16", False, True),
     ("float32", True, False)],
)  # fmt: skip
def test_half_the_bits_only_where_the_processor_has_instructions_for_them(
    precision: str, has: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Trainer.__module__], "has_bfloat16", lambda device: has)
    training = trainer(tmp_path, training={"precision": precision})
    with training._precision():
        assert torch.is_autocast_enabled("cpu") == expected


def test_a_signal_amid_a_step_lets_it_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The curve is the one without a break, though the signal came after half of the update."""
    config = tmp_path / "mine.toml"
    config.write_text(TOML.replace("steps = 4", 'steps = 4\nprecision = "float32"'))
    assert train("unet", tmp_path / "whole", "--config", config) == 0
    follow, before = Trainer._follow, signal.getsignal(signal.SIGTERM)

    def interrupted(self: Trainer, first: int) -> float:
        loss = follow(self, first)
        if first == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "_follow", interrupted)
    assert train("unet", tmp_path / "broken", "--config", config) == Exit.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert train("unet", tmp_path / "broken", "--config", config) == 0
    assert "going on from step 2" in capsys.readouterr().err
    one, two = (
        torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", "broken")
    )
    assert all(torch.equal(one["network"][name], two["network"][name]) for name in one["network"])
    assert [row[3:] for row in one["curve"]] == [row[3:] for row in two["curve"]]


def test_half_a_step_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer(tmp_path)
    training.run(max_hours=0.0)
    kept = (tmp_path / LAST).read_bytes()

    def aborted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[Trainer.__module__], "_update", aborted)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    training.save_if_whole()
    assert (tmp_path / LAST).read_bytes() == kept
