"""Images written and read: by nibabel as oracle, packed and plain, whole or refused."""

import gzip
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch

from qsmpipe import images


@pytest.fixture
def like(tmp_path: Path) -> Path:
    affine = np.array([[0, -2, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    image = nb.Nifti1Image(np.zeros((5, 6, 7), np.int16), affine)
    image.set_qform(affine, code=1)
    nb.save(image, tmp_path / "like.nii.gz")
    return tmp_path / "like.nii.gz"


@pytest.mark.parametrize("echoes", [(), (3,)], ids=["one", "three"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nibabel_reads_what_was_written(
    name: str, echoes: tuple[int, ...], like: Path, tmp_path: Path
) -> None:
    values = torch.randn(*echoes, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    path = images.save(values, tmp_path / name, like=like)
    read = nb.load(path)
    array = values.movedim(0, -1) if echoes else values
    np.testing.assert_array_equal(np.asarray(read.dataobj), array)
    np.testing.assert_array_equal(read.affine, nb.load(like).affine)
    assert torch.equal(images.load(path, like=like), values)
    assert (Path(path).read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_a_plain_image_is_copied_packed_and_a_packed_one_as_it_is(
    like: Path, tmp_path: Path
) -> None:
    plain = Path(images.save(torch.ones(5, 6, 7), tmp_path / "a.nii", like=like))
    packed = Path(images.copy(plain, tmp_path / "b.nii.gz"))
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    again = Path(images.copy(packed, tmp_path / "c.nii.gz"))
    assert again.read_bytes() == packed.read_bytes()
    saved = Path(images.save(torch.ones(5, 6, 7), tmp_path / "d.nii.gz", like=like))
    assert saved.read_bytes() == packed.read_bytes()


def test_several_members_of_one_file_are_read_and_a_wrong_checksum_is_told(
    like: Path, tmp_path: Path
) -> None:
    content = gzip.decompress(like.read_bytes())
    several = tmp_path / "several.nii.gz"
    several.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    assert torch.equal(images.load(several), torch.zeros(5, 6, 7))
    damaged = tmp_path / "damaged.nii.gz"
    packed = bytearray(gzip.compress(content))
    packed[-6] ^= 0xFF
    damaged.write_bytes(packed)
    with pytest.raises(ValueError, match=r"damaged.nii.gz: (truncated or damaged|not a readable)"):
        images.load(damaged)
    damaged.write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(ValueError, match=r"damaged.nii.gz: (truncated or damaged|not a readable)"):
        images.load(damaged)
