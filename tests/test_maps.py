"""A map is a row of one table: what is written, connected and drawn follows from it."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nb
import numpy as np
import pytest
from datasets import SHAPE, write

from qsmpipe import workflows
from qsmpipe.bids import find
from qsmpipe.chain import Chain
from qsmpipe.interfaces.derivatives import WriteDerivatives
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.maps import MAPS, given_by, reported, written
from qsmpipe.numerics.units import hz_per_ppm
from qsmpipe.reports.maps import Maps
from qsmpipe.workflows.qsm import OUTPUTS

NEW_ROWS = """
import sys
from qsmpipe import maps

maps.MAPS["coherence"] = maps.Map(
    "Coherence of the field", "ppm",
    maps.Written("fieldmap", "fmap", desc="coherence", units="Hz", stages=("field",)),
    maps.Shown("Coherence", "From {low:g} to {high:g}.", "Field", (0, 2), "magma", within="brain"),
    given_by="susceptibility", only="with luck",
)
maps.MAPS["tissue"] = maps.Map(
    "Tissue labels", written=maps.Written("dseg", desc="tissue"), given_by="susceptibility",
)
maps.MAPS["regions"] = maps.Map(
    "Mean of each region", written=maps.Written("regions", desc="tissue", extension=".tsv"),
)

from pathlib import Path
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node
from qsmpipe.bids import find
from qsmpipe.chain import Chain
from qsmpipe.checks import examine
from qsmpipe.interfaces.derivatives import WriteDerivatives
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.settings import Settings
from qsmpipe.workflows import init_qsm_wf, init_susceptibility_wf
from qsmpipe.workflows.base import init_acquisition_wf

root, folder, image, table = map(Path, sys.argv[1:])
(acquisition,) = find(root)
examination = examine(acquisition)
settings = Settings(output_dir=str(folder / "out"), inversion="tkd", background="vsharp")
workflow = init_acquisition_wf(examination, settings, {})
for key in ("coherence", "tissue", "regions"):
    assert (f"outputnode.{key}", key) in [
        wire for source, target, data in workflow._graph.edges(data="connect")
        if (source.name, target.name) == ("qsm_wf", "maps") for wire in data
    ], key
    assert (key, key) in [
        wire for source, target, data in workflow._graph.edges(data="connect")
        if (source.name, target.name) == ("maps", "derivatives") for wire in data
    ], key
assert "Coherence of the field (ppm); only with luck." in init_susceptibility_wf.__doc__
assert "Mean of each region." in init_qsm_wf.__doc__
assert "tissue" not in Reportlets.input_spec().copyable_trait_names()

reportlets = Reportlets(coherence=image).run(cwd=str(folder)).outputs
WriteDerivatives(
    examination=examination, output_dir=folder / "out", coherence=image, tissue=image,
    regions=table, steps=[], numbers=reportlets.numbers, figures=reportlets.figures,
    captions=reportlets.captions,
).run(cwd=str(folder))
"""
"""A row is added before anything else is imported: the table is read once."""


def test_a_row_is_enough(tmp_path: Path) -> None:
    """Of a map that is drawn, of labels, and of a table that is no image."""
    root = write(tmp_path / "raw")
    values = np.linspace(0, 2, np.prod(SHAPE)).reshape(SHAPE).astype(np.float32)
    nb.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "given.nii.gz")
    (tmp_path / "given.tsv").write_text("region\tmean\nputamen\t0.05\n")
    given = [root, tmp_path, tmp_path / "given.nii.gz", tmp_path / "given.tsv"]
    subprocess.run([sys.executable, "-c", NEW_ROWS, *map(str, given)], check=True)
    out = tmp_path / "out" / "sub-01"
    stem = out / "fmap" / "sub-01_desc-coherence_fieldmap"
    sidecar = json.loads(stem.with_suffix(".json").read_text())
    assert sidecar["Units"] == "Hz"
    assert sidecar["Description"] == "Coherence of the field"
    hertz = nb.load(stem.with_suffix(".nii.gz")).get_fdata()
    np.testing.assert_allclose(hertz, values * hz_per_ppm(3.0), rtol=1e-5)
    labels = json.loads((out / "anat" / "sub-01_desc-tissue_dseg.json").read_text())
    assert labels["Description"] == "Tissue labels"
    assert "Units" not in labels
    assert (out / "anat" / "sub-01_desc-tissue_regions.tsv").read_text().endswith("0.05\n")
    assert (out / "anat" / "sub-01_desc-tissue_regions.json").exists()
    (picture,) = (out / "figures").iterdir()
    assert picture.name == "sub-01_desc-coherence_qsm.png"


def test_what_is_not_written_has_no_file() -> None:
    with pytest.raises(ValueError, match="not written"):
        _ = MAPS["phase"].file


@pytest.mark.parametrize("interface", [WriteDerivatives, Reportlets])
def test_an_interface_takes_the_maps_that_it_is_for(interface: Any) -> None:
    rows = written() if interface is WriteDerivatives else reported()
    spec = interface.input_spec()
    assert set(MAPS) & set(spec.copyable_trait_names()) == set(rows)
    for key, row in rows.items():
        assert spec.trait(key).desc == row.summary


def test_the_chain_gives_every_map_and_says_so() -> None:
    outputs = workflows.init_qsm_wf(echoes=3).get_node("outputnode").interface._fields
    assert set(outputs) == set(OUTPUTS)
    assert set(outputs) - set(given_by("qsm", "susceptibility")) == {
        "reference_value", "b0_direction", "steps",
    }  # fmt: skip
    text = inspect.getdoc(workflows.init_qsm_wf) or ""
    assert "{maps}" not in text
    assert all(f"\n{name}\n    " in text for name in outputs)


@pytest.mark.parametrize("part", ["", "susceptibility_wf"])
def test_no_map_lacks_its_wire(part: str) -> None:
    """In a chain that leaves nothing out."""
    chain = Chain(inversion="tkd,tv", swi="homodyne", reference="csf", uncertainty=2)
    workflow = workflows.init_qsm_wf(echoes=3, chain=chain)
    workflow = workflow.get_node(part) if part else workflow
    outputnode = workflow.get_node("outputnode")
    wired = {
        field
        for _, target, wires in workflow._graph.edges(data="connect")
        for _, field in wires
        if target is outputnode
    }
    assert wired == set(outputnode.interface._fields)


def test_maps_are_known_by_their_keys() -> None:
    maps = Maps(np.eye(4), chi=np.zeros(SHAPE), compared={"tv": np.ones(SHAPE)})
    assert maps.shape == SHAPE
    assert maps.r2star is None
    assert maps.compared["tv"].dtype == np.float64
    with pytest.raises(TypeError, match="no map chii"):
        Maps(np.eye(4), chii=np.zeros(SHAPE))
    with pytest.raises(AttributeError, match="no map chii"):
        _ = maps.chii


@pytest.mark.parametrize("key", [key for key, row in MAPS.items() if row.shown])
def test_a_picture_can_be_drawn_as_its_row_says(key: str) -> None:
    shown = MAPS[key].shown
    assert shown is not None
    assert shown.colours in matplotlib.colormaps
    text = shown.caption.format(low=-1.0, high=1.0, hertz=" (Hz)", outlines="Blue.")
    assert text.rstrip().endswith(".")
    assert shown.label or MAPS[key].units


def test_the_documentation_names_every_map() -> None:
    """Its file in docs/outputs.md, its output in docs/embedding.md."""
    docs = Path(__file__).parents[1] / "docs"
    files = (docs / "outputs.md").read_text()
    for row in written().values():
        file = row.file
        labels = {"part": file.part, "desc": file.desc.replace("{method}", "METHOD")}
        name = "_".join([f"{k}-{label}" for k, label in labels.items() if label] + [file.suffix])
        assert re.search(rf"`(\*_)?{re.escape(name)}(\.nii\.gz)?`", files), name
    fields = re.findall(r"`(\w+)`", (docs / "embedding.md").read_text())
    assert set(OUTPUTS) <= set(fields)


def test_no_two_maps_share_a_file(tmp_path: Path) -> None:
    (acquisition,) = find(write(tmp_path))
    names = [acquisition.output(key, method="tv") for key in written()]
    assert len(set(names)) == len(names)
