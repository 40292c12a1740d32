"""Figures, numbers, pages and methods text of a run, from an analytic head and made-up records."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.orientations import aff2axcodes
from nipype.pipeline.engine import Node
from PIL import Image

from qsmpipe import records
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.maps import reported
from qsmpipe.methods import METHODS
from qsmpipe.numerics.units import GAMMA
from qsmpipe.records import (
    Convergence,
    Earlier,
    Failure,
    Figure,
    Finding,
    NodeRun,
    Number,
    Planned,
    Record,
    Run,
    Step,
)
from qsmpipe.references import references
from qsmpipe.reports import boilerplate, figures, labels, numbers
from qsmpipe.reports.figures import mosaic, susceptibility
from qsmpipe.reports.figures.view import TIGHT, View, slice_of
from qsmpipe.reports.maps import Maps
from qsmpipe.reports.page import build_index, build_subject

SHAPE = (30, 34, 26)


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def affine(zooms: tuple[float, ...] = (2.0, 2.0, 2.0), degrees: float = 0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(degrees) * zooms
    matrix[:3, 3] = (-20, -30, -10)
    return matrix


def head(
    shape: tuple[int, int, int] = SHAPE,
    matrix: np.ndarray | None = None,
    *,
    echoes: int = 3,
    **changes: Any,
) -> Maps:
    """An ellipsoid of a brain with two nuclei."""
    matrix = affine() if matrix is None else matrix
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.8
    inner = x**2 + y**2 + z**2 < 0.6
    nuclei = ((np.abs(x) - 0.3) ** 2 + y**2 + z**2) < 0.03
    random = np.random.default_rng(0)
    chi = np.where(inner, 0.1 * nuclei + 0.01 * random.standard_normal(shape), 0)
    field = 0.3 * x * z + 0.02 * nuclei
    times = [0.004 * (e + 1) for e in range(echoes)]
    wraps = [np.angle(np.exp(2j * np.pi * GAMMA * 3 * t * field)) for t in times]
    given: dict[str, Any] = {
        "magnitude": np.stack([100 * np.exp(-20 * t) * (brain + 0.1) for t in times]),
        "phase": np.stack(wraps),
        "quality": 0.9 * brain,
        "brain_mask": brain,
        "field": field * brain,
        "noise": 0.002 * brain,
        "local_field": 0.02 * nuclei * inner,
        "qsm_mask": inner,
        "chi": chi,
        "cosmos": 1.1 * chi,
        "swi": brain - 0.5 * nuclei,
        "minip": brain - 0.6 * nuclei,
        "r2star": 20.0 * brain,
        "field_strength": 3.0,
        "echo_times": times,
        "reference_value": 0.0012,
    }
    return Maps(affine=matrix, **(given | changes))


GRIDS = {
    "axial": (SHAPE, affine()),
    "oblique": (SHAPE, affine((1.0, 1.5, 3.0), 30)),
    "nearly half way": (SHAPE, affine(degrees=44)),
    "sagittal": (SHAPE, affine()[:, [2, 0, 1, 3]] * [-1, 1, -1, 1]),
    "odd": ((31, 23, 17), affine((0.7, 2.1, 3.3), -12)),
    "tiny": ((20, 20, 20), affine()),
    "thin": ((24, 20, 3), affine((1, 1, 5))),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_grid_gives_every_figure(
    grid: tuple[tuple[int, int, int], np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mosaic, "WIDTH", 600)  # enough to see that it draws
    pictures = figures.draw(head(*grid), tmp_path)
    assert len(pictures) == 13
    assert len({picture.file for picture in pictures}) == 13
    for picture in pictures:
        image = Image.open(picture.file)
        assert image.width == 600
        assert 60 < image.height < 2000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10, "an empty picture"
        assert picture.caption.endswith(".")


EMPTY = {
    "zeros": {
        name: np.zeros(SHAPE)
        for name in ("quality", "field", "noise", "local_field", "chi", "r2star")
    },
    "not finite": {
        name: np.full(SHAPE, np.nan)
        for name in ("quality", "field", "noise", "local_field", "chi", "r2star")
    },
    "infinite": {"chi": np.full(SHAPE, np.inf), "magnitude": np.full((2, *SHAPE), np.inf)},
    "empty masks": {"brain_mask": np.zeros(SHAPE, bool), "qsm_mask": np.zeros(SHAPE, bool)},
    "empty QSM mask": {"qsm_mask": np.zeros(SHAPE, bool)},
    "full masks": {"brain_mask": np.ones(SHAPE, bool), "qsm_mask": np.ones(SHAPE, bool)},
    "one voxel": {"brain_mask": np.arange(np.prod(SHAPE)).reshape(SHAPE) == 12345},
    "no scanner": {"field_strength": None, "echo_times": (), "reference_value": None},
    "one echo": {"magnitude": np.ones(SHAPE), "phase": np.zeros(SHAPE), "echo_times": [0.02]},
    "20 echoes": {"phase": np.zeros((20, *SHAPE)), "magnitude": None},
}


@pytest.mark.parametrize("changes", EMPTY.values(), ids=EMPTY)
def test_poor_maps_are_drawn_and_measured_all_the_same(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic, "WIDTH", 600)
    maps = head(**changes)
    for picture in figures.draw(maps, tmp_path):
        Image.open(picture.file).load()
    json.dumps([asdict(number) for number in numbers.summarise(maps)], allow_nan=False)


def test_only_what_is_there_is_drawn(tmp_path: Path) -> None:
    chi = head().chi
    maps = Maps(affine=affine(), chi=torch.as_tensor(chi))
    assert {p.section for p in figures.draw(maps, tmp_path)} == {"Susceptibility"}
    assert figures.draw(Maps(affine=affine(), magnitude=chi), tmp_path)[0].section != ""


def test_maps_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        head(chi=np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="no map"):
        _ = Maps(affine=affine()).shape


ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_views_are_those_of_nibabels_canonical_images(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = (rotation(20) * (1.0, 2.0, 3.0))[:, order] * signs
    matrix[:3, 3] = (5, -7, 11)
    volume = np.random.default_rng(1).random((7, 6, 5)).astype(np.float32)
    canonical = nb.as_closest_canonical(nb.Nifti1Image(volume, matrix))
    view = View.of(matrix, np.ones(volume.shape, bool), 0.0)
    np.testing.assert_array_equal(view.crop(volume), canonical.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(view.zooms, canonical.header.get_zooms(), rtol=1e-5)
    assert "".join(aff2axcodes(canonical.affine)) == "RAS"
    centre = (np.array(canonical.shape) - 1) / 2
    for plane in range(3):
        voxel = centre.copy()
        voxel[plane] = 1
        where = (canonical.affine @ [*voxel, 1])[plane]
        side, number, unit = view.place(plane, 1).split()
        assert float(number) == pytest.approx(abs(where), abs=0.501)
        assert unit == "mm"
        if abs(where) > 0.5:
            assert side == ("RAS" if where > 0 else "LPI")[plane]


def test_the_patients_right_and_front_are_where_the_letters_say() -> None:
    matrix = affine((1, 1, 1)) * [-1, 1, 1, 1]  # voxel axis 0 runs to the left
    volume = np.zeros((20, 22, 24))
    volume[2, 18, 20] = 1  # right, front, top
    cropped = View.of(matrix, np.ones(volume.shape, bool), 0.0).crop(volume)
    for plane, (rows, columns) in ((2, (22, 20)), (1, (24, 20)), (0, (24, 22))):
        cut = int(np.argmax(cropped.sum(tuple({0, 1, 2} - {plane}))))
        seen = slice_of(cropped, plane, cut)
        assert seen.shape == (rows, columns)
        row, column = np.argwhere(seen)[0]
        assert row < rows / 2, "top of the head, or front, is up"
        assert column < columns / 2, "right, or front, is on the left"


def test_slices_stay_inside_the_mask() -> None:
    mask = np.zeros((60, 50, 40), bool)
    mask[20:40, 10:30, 5:25] = True
    mask[20, 10, 38] = True  # a stray voxel
    view = View.of(affine((1, 1, 1)), mask, 2.0)
    cropped = view.crop(mask)
    assert cropped.shape == (24, 24, 24)
    for plane in range(3):
        cuts = view.cuts(plane, 6)
        assert len(cuts) == 6
        assert all(slice_of(cropped, plane, cut).any() for cut in cuts)


def test_figures_are_the_same_bytes_whatever_the_users_matplotlib_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic, "WIDTH", 600)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, size in zip(folders, (10, 31), strict=True):
        folder.mkdir()
        with matplotlib.rc_context({"font.size": size, "image.interpolation": "bicubic"}):
            figures.draw(head(), folder)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_the_eroded_rim_is_tinted(tmp_path: Path) -> None:
    def brown(maps: Maps) -> int:
        view = View.of(maps.affine, maps.brain_mask, TIGHT)
        picture = susceptibility.draw_susceptibility(maps, view, tmp_path)
        pixels = np.asarray(Image.open(picture.file).convert("RGB")).astype(int)
        target = np.rint(255 * np.array(matplotlib.colors.to_rgb(mosaic.ERODED)))
        return int((np.abs(pixels - target).max(-1) < 12).sum())

    assert brown(head()) > 10_000
    assert brown(head(qsm_mask=head().brain_mask)) == 0


def test_susceptibility_is_grey_from_minus_to_plus_a_tenth() -> None:
    paint = mosaic.Paint("gray", susceptibility.CHI_WINDOW, "ppm")
    np.testing.assert_allclose(
        paint(np.array([-0.2, -0.1, 0, 0.05, 0.1, 9]))[:, 0], [0, 0, 0.5, 0.75, 1, 1], atol=0.01
    )


def value(found: list[Number], label: str, unit: str | None = None) -> Any:
    return next(n.value for n in found if n.label == label and unit in (None, n.unit))


def test_numbers_have_the_values_and_units_they_claim() -> None:
    maps = head()
    found = numbers.summarise(maps)
    assert value(found, labels.BRAIN_VOLUME) == pytest.approx(maps.brain_mask.sum() * 8 / 1000)
    lost = 100 * (1 - maps.qsm_mask.sum() / maps.brain_mask.sum())
    assert value(found, labels.LOST) == pytest.approx(lost)
    assert value(found, labels.ECHOES) == 3
    assert value(found, labels.REFERENCE) == 0.0012
    assert value(found, labels.CHI_SD) == pytest.approx(maps.chi[maps.qsm_mask].std())
    ppm, hertz = (value(found, "Total field, SD", unit) for unit in ("ppm", "Hz"))
    assert hertz / ppm == pytest.approx(127.732, rel=1e-4)
    low, high = value(found, "Total field, 1 to 99 %", "ppm")
    assert low < 0 < high
    assert value(found, labels.R2STAR) == pytest.approx(20)
    assert {n.label for n in found} >= set(labels.HEADLINES)


def test_extreme_and_missing_values_are_counted() -> None:
    maps = head()
    chi = maps.chi.copy()
    places = np.argwhere(maps.qsm_mask)
    chi[tuple(places[0])], chi[tuple(places[1])] = 7.0, np.nan
    found = numbers.summarise(head(chi=chi))
    assert value(found, "Voxels not finite") == 1
    count = maps.qsm_mask.sum() - 1
    assert value(found, labels.EXTREME) == pytest.approx(100 / count)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.4])
def test_phase_noise_is_found_under_wraps(noise: float) -> None:
    x, _, z = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    phase = 9 * x * z + 4 * x + noise * np.random.default_rng(2).standard_normal(x.shape)
    wrapped = np.angle(np.exp(1j * phase))
    found = numbers.phase_noise(wrapped, np.ones(x.shape, bool))
    assert found == pytest.approx(noise, rel=0.1)


def test_a_jump_in_the_field_is_counted_once_per_pair() -> None:
    field = np.zeros((10, 8, 6))
    field[5:] += 1.0
    mask = np.ones(field.shape, bool)
    assert numbers.phase_jumps(field, mask, 1.0) == 48
    assert numbers.phase_jumps(field, mask, 2.1) == 0
    mask[5] = False
    assert numbers.phase_jumps(field, mask, 1.0) == 0


def test_a_harmonic_field_is_larger_at_the_edge() -> None:
    x, y, z = np.meshgrid(*(np.arange(-20.0, 21),) * 3, indexing="ij")
    mask = x**2 + y**2 + z**2 < 18**2
    zooms = np.ones(3)
    white = np.random.default_rng(3).standard_normal(x.shape)
    assert numbers.edge_ratio(white, mask, zooms) == pytest.approx(1, abs=0.1)
    assert numbers.edge_ratio(x**2 - y**2 + x * z, mask, zooms) > 2.5
    assert np.isnan(numbers.edge_ratio(white, np.zeros_like(mask), zooms))


@pytest.mark.parametrize("share", [-0.05, 0.0, 0.02, 0.1, 0.5])
def test_the_share_of_background_left_behind_is_found(share: float) -> None:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    mask = x**2 + y**2 + z**2 < 0.8
    tissue = 0.02 * np.random.default_rng(4).standard_normal(x.shape)
    background = 0.5 * (x**2 - y**2) + 0.3 * x * z + 0.2 * z + 0.1
    found = numbers.background_left(tissue + background, tissue + share * background, mask)
    assert found == pytest.approx(share, abs=0.005)
    assert np.isnan(numbers.background_left(tissue, tissue, mask))


# The interface


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("maps")
    maps = head()
    paths = {}
    for name in ("magnitude", "phase", "quality", "brain_mask", "field", "noise", "local_field",
                 "qsm_mask", "chi", "r2star"):  # fmt: skip
        array = np.asarray(getattr(maps, name))
        array = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
        paths[name] = str(folder / f"{name}.nii.gz")
        nb.Nifti1Image(array.astype(np.float32), maps.affine).to_filename(paths[name])
    return paths


def test_the_interface_draws_and_measures(files: dict[str, str], tmp_path: Path) -> None:
    node = Node(
        Reportlets(
            **files,
            field_strength=3.0,
            reference_value=0.0012,
            echo_times=[0.004, 0.008, 0.012],
        ),
        name="reportlets",
        base_dir=tmp_path,
    )
    outputs = node.run().outputs
    assert [Path(path).name for path in outputs.figures] == [c["file"] for c in outputs.captions]
    assert all(set(c) == {"file", "title", "caption", "section"} for c in outputs.captions)
    assert all(set(n) == {"label", "value", "unit"} for n in outputs.numbers)
    json.dumps([outputs.captions, outputs.numbers], allow_nan=False)
    assert value(records.take(Number, outputs.numbers), labels.ECHOES) == 3


def test_what_is_there_before_the_inversion_and_after_it_makes_one_report(
    files: dict[str, str], tmp_path: Path
) -> None:
    def run(*about: str) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        folder = tmp_path / ("-".join(about)[:20] or "all")
        folder.mkdir()
        chosen = {"about": list(about)} if about else {}
        done = Reportlets(**files, **chosen, field_strength=3.0).run(cwd=str(folder)).outputs
        return {Path(f).name: Path(f).read_bytes() for f in done.figures}, done.numbers

    pictures, told = run()
    first, early = run(*reported(inverted=False))
    second, late = run(*reported(inverted=True))
    assert set(first) & set(second) == set()
    assert first | second == pictures
    assert sorted(map(str, early + late)) == sorted(map(str, told))


def test_the_choice_of_lambda_is_drawn(files: dict[str, str], tmp_path: Path) -> None:
    curve = {
        "lambdas": [1e-4, 1e-3, 1e-2], "residuals": [1.0, 2.0, 9.0], "penalties": [9.0, 3.0, 2.0],
        "chosen": 1, "rule": "l-curve", "found": True,
    }  # fmt: skip
    steps = [
        {"stage": "mask", "method": "bet"},
        {"stage": "inversion", "method": "tv", "curve": curve},
        {"stage": "inversion", "method": "l2", "curve": curve | {"found": False}},
        {"stage": "inversion", "method": "tkd", "curve": curve | {"residuals": [0.0, 0.0, 0.0]}},
    ]
    node = Node(Reportlets(chi=files["chi"], steps=steps), name="curves", base_dir=tmp_path)
    outputs = node.run().outputs
    captions = {caption["title"]: caption for caption in outputs.captions}
    caption = captions["Choice of lambda"]
    assert caption["section"] == "Susceptibility"
    assert "tv: 0.001, by the rule l-curve." in caption["caption"]
    assert "l2: 0.001, as none was found by the rule l-curve." in caption["caption"]
    assert "tkd" not in caption["caption"]
    (path,) = (Path(p) for p in outputs.figures if Path(p).name == caption["file"])
    orange = np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - (255, 176, 0))
    assert (orange.max(-1) < 40).sum() > 100


def test_the_interface_takes_what_there_is(files: dict[str, str], tmp_path: Path) -> None:
    node = Node(Reportlets(chi=files["chi"]), name="some", base_dir=tmp_path)
    assert len(node.run().outputs.figures) == 3
    with pytest.raises(Exception, match="at least one map"):
        Node(Reportlets(), name="none", base_dir=tmp_path).run()


# The page


EVIL = "<script>alert('x')</script> & \"quoted\""

STEPS = (
    Step("offset", "mcpc3ds", {"sigma": 7.0}),
    Step("unwrap", "romeo"),
    Step(
        "inversion",
        "tv",
        {"lambda_": 2.5e-4, "max_iterations": 100},
        Convergence(converged=False, iterations=100, change=1.4e-3, tolerance=1e-3),
        ("inversion (tv) stopped after 100 iterations",),
    ),
    Step("reference", "brain"),
)

PLAN = (
    Planned("phase prepare", "phase", "prepare"),
    *(Planned(f"mask {x}", "mask", x, {"magnitude": ("phase prepare",)}) for x in "abcdef"),
    Planned("unwrap romeo", "unwrap", "romeo", {"mask": tuple(f"mask {x}" for x in "abcdef")}),
    Planned("inversion tv", "inversion", "tv", {"field": ("unwrap romeo",)}),
)

RUN = Run(
    "20251120-101112_one",
    command="qsmpipe in out participant",
    versions={"qsmpipe": "0.1.0", "torch": "2.13.0"},
    settings={"reference": "brain", "preset": "fast", "parameters": {"inversion": {"a": 1}}},
    started=datetime(2025, 11, 20, 10, 11, 12, tzinfo=UTC),
    finished=datetime(2025, 11, 20, 10, 30, 40, tzinfo=UTC),
)


def write(out: Path, name: str, subject: str, **parts: Any) -> Record:
    record = Record(name, subject, **({"run": RUN.id, "status": "done"} | parts))
    records.write_record(out, record)
    return record


def build(out: Path) -> None:
    """Write the pages and the methods text of all runs."""
    book = records.read(out)
    for subject in {record.subject for record in book.records}:
        build_subject(out, subject, book)
    build_index(out, book)
    boilerplate.write_boilerplate(out / "logs", book.shown(), book.runs)


def make_output(out: Path) -> Path:
    """A run of three subjects: done (with a warning), refused and failed."""
    records.write_run(out, RUN)
    folder = out / "sub-01/figures"
    folder.mkdir(parents=True)
    maps = head()
    pictures = figures.draw(maps, folder)
    write(
        out,
        "sub-01_MEGRE",
        "01",
        acquisition={
            "Field strength (T)": "3",
            "Echo times (ms)": "4, 8, 12",
            "TE1:ΔTE:TEmax (ms)": "4:4:12",
            "Manufacturer": EVIL,
        },
        findings=(
            Finding("note", "B0", "slices are tilted"),
            Finding("warning", "phase scale", EVIL),
        ),
        plan=PLAN,
        steps=STEPS,
        numbers=tuple(numbers.summarise(maps)),
        figures=tuple(
            Figure(str(p.file.relative_to(out)), p.title, p.caption, p.section) for p in pictures
        ),
        nodes=(NodeRun("tv", "done", 75.2, 2048.0), NodeRun("romeo", "not run")),
    )
    write(
        out,
        "sub-02_MEGRE",
        "02",
        status="refused",
        findings=(Finding("error", "echo times", "EchoTime is 12: give seconds"),),
    )
    failure = Failure("romeo", "no seed", "/out/logs/crash-1.txt")
    write(out, "sub-03_run-1_MEGRE", "03", status="failed", failures=(failure,))
    write(out, "sub-03_run-2_MEGRE", "03", status="started")
    build(out)
    return out


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("out") / "derivatives")


class Page(HTMLParser):
    """Text, links, sources, ids; complains of tags that do not close."""

    VOID = frozenset({"meta", "img", "br", "input", "link", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [a["id"] for _, a in self.tags if "id" in a]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


PAGES = ("sub-01", "sub-02", "sub-03", "index")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_but_itself(output: Path, name: str) -> None:
    page = Page(output / f"{name}.html")
    assert not page.of("script")
    assert not page.of("link")
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.of("img"))
    assert "url(" not in (output / f"{name}.html").read_text()
    assert "@import" not in (output / f"{name}.html").read_text()
    assert len(page.ids) == len(set(page.ids)), "ids must be unique"
    for link in page.of("a"):
        target = str(link["href"])
        if target.startswith("#"):
            assert target[1:] in page.ids, target
        elif not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            assert (output / file).is_file(), target
            assert not anchor or anchor in Page(output / file).ids, target


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_aloud(output: Path, name: str) -> None:
    page = Page(output / f"{name}.html")
    assert page.of("html")[0]["lang"] == "en"
    assert all(len(image["alt"] or "") > 20 for image in page.of("img"))
    assert len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels) if a > 1)


def test_what_a_record_says_is_text_and_never_markup(output: Path) -> None:
    source = (output / "sub-01.html").read_text()
    assert "<script>" not in source
    assert EVIL in Page(output / "sub-01.html").text
    assert "&lt;script&gt;" in (output / "sub-01.html").read_text()


def test_a_page_tells_everything_that_the_record_holds(output: Path) -> None:
    page = Page(output / "sub-01.html")
    assert len(page.of("img")) == 13
    for words in (
        "Done, with warnings",
        "slices are tilted",
        "4:4:12",
        "not converged",
        "100 iterations, change 0.0014 (stops below 0.001)",
        "lambda 0.00025",
        "1 min 15 s",
        "2.00 GB",
        "Radiological view",
        "doi:10.1002/mrm.30006",
        "torch",
        "2.13.0",
        "2025-11-20 10:30:40",
        "Phase jumps left in the total field",
        "qsmpipe in out participant",
        "not stated",
        "Hz at 3 T",
    ):
        assert words in page.text, words
    assert (output / "sub-01.html").stat().st_size < 10e6


def test_a_warning_comes_before_the_pictures(output: Path) -> None:
    source = (output / "sub-01.html").read_text()
    assert source.index('class="messages"') < source.index("<img")


def test_a_refused_acquisition_says_what_to_do(output: Path) -> None:
    page = Page(output / "sub-02.html")
    assert "Refused by the input check" in page.text
    assert "EchoTime is 12: give seconds" in page.text
    assert not page.of("img")


def test_a_failed_acquisition_names_node_and_crash_file(output: Path) -> None:
    page = Page(output / "sub-03.html")
    for words in ("Failed", "romeo", "no seed", "/out/logs/crash-1.txt", "Not finished"):
        assert words in page.text


def test_the_index_links_every_subject_with_its_status(output: Path) -> None:
    page = Page(output / "index.html")
    links = {str(link["href"]) for link in page.of("a")}
    assert {"sub-01.html#sub-01_MEGRE", "sub-03.html#sub-03_run-1_MEGRE"} <= links
    for words in ("3 subjects, 4 acquisitions", "1 done, with warnings", "1 failed", "mL"):
        assert words in page.text


def test_the_same_records_give_the_same_page(output: Path) -> None:
    before = {name: (output / f"{name}.html").read_bytes() for name in PAGES}
    build(output)
    assert before == {name: (output / f"{name}.html").read_bytes() for name in PAGES}


def test_what_is_missing_or_broken_does_not_stop_the_report(tmp_path: Path) -> None:
    assert "no record" in Page(build_index(tmp_path, records.read(tmp_path))).text
    records.write_run(tmp_path, RUN)
    folder = records.log_folder(tmp_path, RUN.id) / "acquisitions"
    folder.mkdir()
    (folder / "sub-04_MEGRE.json").write_text('{"name": "sub-04')
    write(
        tmp_path,
        "sub-05_MEGRE",
        "05",
        figures=(Figure("sub-05/figures/gone.png", "Gone", section="Phase"),),
        numbers=(Number("Echoes", None),),
        steps=(Step("future", "new", convergence=Convergence(converged=True, iterations=3)),),
        nodes=(NodeRun("x", "not run"),),
    )
    (folder / "sub-06_MEGRE.json").write_text("{}")
    write(tmp_path, "sub-07_MEGRE", "07", run="another")
    book = records.read(tmp_path)
    broken = Page(build_subject(tmp_path, "04", book)).text
    assert "run this acquisition again" in broken
    assert "passed" not in broken, "what was never checked has not passed"
    assert "Picture missing" in Page(build_subject(tmp_path, "05", book)).text
    assert "it has no format" in Page(build_subject(tmp_path, "06", book)).text
    assert "another/run.json is missing" in Page(build_subject(tmp_path, "07", book)).text
    assert "holds no record" in Page(build_subject(tmp_path, "99", book)).text
    assert "sub-04" in Page(build_index(tmp_path, book)).text


def later(**changes: Any) -> Run:
    """A second run, of the day after."""
    moments = {
        "started": datetime(2025, 11, 21, 9, 0, 0, tzinfo=UTC),
        "finished": datetime(2025, 11, 21, 9, 9, 9, tzinfo=UTC),
    }
    return replace(RUN, id="20251121-090000_two", **(moments | changes))


def test_a_later_run_changes_nothing_in_the_pages_of_an_earlier_one(tmp_path: Path) -> None:
    records.write_run(tmp_path, RUN)
    write(tmp_path, "sub-01", "01", steps=STEPS)
    build(tmp_path)
    before = (tmp_path / "sub-01.html").read_bytes()
    other = later(
        command="qsmpipe in out participant --reference none",
        settings={"reference": "none"},
        versions={"qsmpipe": "0.2.0"},
    )
    records.write_run(tmp_path, other)
    write(tmp_path, "sub-02", "02", run=other.id, steps=STEPS)
    build(tmp_path)
    assert (tmp_path / "sub-01.html").read_bytes() == before
    text = Page(tmp_path / "sub-02.html").text
    assert "qsmpipe 0.2.0" in text
    assert "not referenced" in text
    index = Page(tmp_path / "index.html").text
    for words in ("2 subjects, 2 acquisitions", RUN.command, other.command, "2025-11-20 10:11:12"):
        assert words in index
    methods = (tmp_path / "logs/CITATION.md").read_text()
    first, second = methods.split("# Parameters")[0].split("**sub-02**")
    assert "**sub-01**" in first
    assert "qsmpipe 0.1.0" in first
    assert "relative to the mean over the whole brain" in first
    assert "qsmpipe 0.2.0" in second
    assert "not referenced" in second


def test_each_acquisition_of_a_page_tells_of_its_own_run(tmp_path: Path) -> None:
    records.write_run(tmp_path, RUN)
    other = later(command="qsmpipe in out participant --session-label 2")
    records.write_run(tmp_path, other)
    write(tmp_path, "sub-01_ses-1", "01", steps=STEPS)
    write(tmp_path, "sub-01_ses-2", "01", run=other.id, steps=STEPS)
    build(tmp_path)
    page = Page(tmp_path / "sub-01.html")
    assert f"Run {RUN.id} sub-01_ses-1 {RUN.command}" in page.text
    assert f"Run {other.id} sub-01_ses-2 {other.command}" in page.text
    links = [str(link["href"]) for link in page.of("a")]
    assert links.index(f"#{RUN.id}") < links.index(f"#{other.id}")
    assert {RUN.id, other.id} <= set(page.ids)
    assert page.text.count("2 acquisitions of 1 participant were processed") == 1


def test_maps_of_an_earlier_run_are_told_of_with_that_run(tmp_path: Path) -> None:
    """The later run refused the acquisition: the maps that lie there are not its."""
    records.write_run(tmp_path, RUN)
    write(tmp_path, "sub-01", "01", steps=STEPS, numbers=(Number("Echoes", 5),))
    other = later()
    records.write_run(tmp_path, other)
    maps = Earlier(("sub-01/anat/sub-01_Chimap.nii.gz", "b", "c"), RUN.finished, RUN.id)
    finding = Finding("error", "echo times", "EchoTime is 12: give seconds")
    write(
        tmp_path, "sub-01", "01", run=other.id, status="refused", findings=(finding,),
        earlier=(maps,),
    )  # fmt: skip
    build(tmp_path)
    page = Page(tmp_path / "sub-01.html")
    said = (
        "3 maps of an earlier run stay, though this run refused the acquisition: "
        "sub-01/anat/sub-01_Chimap.nii.gz and 2 more, written 2025-11-20 10:30:40 by run "
        f"{RUN.id}; delete or move them unless wanted"
    )
    assert said in page.text
    refused, earlier = page.text.split("The maps in this folder are of this run")
    assert "Refused by the input check" in refused
    assert "lambda 0.00025" not in refused
    assert "lambda 0.00025" in earlier
    assert {"sub-01", "sub-01-earlier"} <= set(page.ids)
    index = Page(tmp_path / "index.html").text
    assert "1 refused by the input check" in index
    assert "1 subject, 1 acquisition" in index
    assert "2025-11-20 10:11:12" in index, "the run whose maps are there"
    assert "lambda 0.00025" in (tmp_path / "logs/CITATION.md").read_text()


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    records.write_run(tmp_path, replace(RUN, stopped_by="SIGTERM"))
    write(tmp_path, "sub-01", "01", status="interrupted")
    build(tmp_path)
    page = Page(tmp_path / "sub-01.html").text
    assert "The run was stopped by SIGTERM before this acquisition was done" in page
    assert "Stopped before it was done" in Page(tmp_path / "index.html").text


def test_pages_are_built_without_torch_nipype_and_matplotlib() -> None:
    code = (
        "import sys, qsmpipe.reports.page, qsmpipe.reports.boilerplate;"
        "print({'torch', 'nipype', 'matplotlib', 'scipy', 'nibabel'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


# Methods text


ROWS = [(stage, name) for stage, rows in METHODS.items() for name in rows]


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_every_method_has_its_references(stage: str, name: str) -> None:
    assert set(METHODS[stage][name].cite) <= set(references())


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_every_method_has_a_sentence_with_and_without_parameters(stage: str, name: str) -> None:
    row = METHODS[stage][name]
    placeholders = re.findall(r"\{(\w+)", row.text)
    full = boilerplate.sentence(Step(stage, name, dict.fromkeys(placeholders, 1.25)))
    bare = boilerplate.sentence(Step(stage, name))
    for text in (full, bare):
        assert "{" not in text
        assert "()" not in text
        assert text.endswith(".")
    assert full.count("1.25") == len(placeholders)
    assert boilerplate.cited(full) == list(row.cite)


def test_missing_placeholders_take_their_words_along() -> None:
    fill = boilerplate._fill
    assert fill("Done (radius {r} mm, lambda {l}).", {"r": 3.0}) == "Done (radius 3 mm)."
    assert fill("Done (radius {r} mm).", {}) == "Done."
    assert fill("Done (ADMM).", {}) == "Done (ADMM)."
    assert fill("With radii {r}.", {"r": [3.0, 2.5]}) == "With radii 3, 2.5."
    assert "{" not in fill("With {x} iterations.", {})


def test_the_methods_text_says_what_was_done_and_cites_it(output: Path) -> None:
    text = (output / "logs/CITATION.md").read_text()
    for words in (
        "1 acquisition of 1 participant was processed with qsmpipe 0.1.0",
        "sigma 7 mm",
        "[@eckstein2018; @eckstein2021]",
        "lambda 0.00025",
        "4:4:12 ms",
        "whole brain",
        "| Pipeline | Toolbox and version | mandatory | qsmpipe 0.1.0",
        "| Sequence | Flip angle | recommended | not stated |",
    ):
        assert words in text, words
    bib = (output / "logs/CITATION.bib").read_text()
    keys = re.findall(r"^@\w+\{([^,]+),", bib, re.M)
    assert sorted(boilerplate.cited(text)) == keys, "only what is cited, all of what is cited"
    assert "kames2018" not in keys


def test_acquisitions_that_were_processed_alike_share_a_paragraph() -> None:
    def record(name: str, method: str, run: str = "first") -> Record:
        return Record(name, "01", run, steps=(Step("inversion", method),))

    alike = [record("a", "tkd"), record("b", "rts"), record("c", "tkd", "second")]
    text = boilerplate.methods_text(alike, {})
    assert "**a, c.**" in text
    assert "**b.**" in text
    assert text.count("thresholded k-space division") == 1
    assert boilerplate.methods_text([], {}) == "No acquisition was processed."


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("brain", "whole brain mask"),
        ("none", "not referenced"),
        ("region:CSF", "mean over the region CSF"),
        ("csf:8", "fluid of the ventricles (R2* below 8 /s)"),
    ],
)
def test_the_reference_is_always_stated(reference: str, words: str) -> None:
    found = (Number(labels.REFERENCE, 0.002, "ppm"), Number(labels.CHI_MEAN, -0.01, "ppm"))
    run = replace(RUN, settings={"reference": reference})
    record = Record("a", "01", run.id, steps=STEPS, numbers=found)
    assert words in boilerplate.methods_text([record], {run.id: run})
    rows = {row["name"]: row["value"] for row in boilerplate.checklist(record, run)}
    assert words in rows["Referencing"]
    region = "Reference region relative to the whole brain"
    assert (region in rows) == reference.startswith(("region", "csf"))
