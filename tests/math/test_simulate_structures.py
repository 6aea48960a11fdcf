"""Structures from files: atoms, assemblies and maps against closed forms; real ones where the data are."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.io.mrc import write_mrc
from faml_gpu.simulate import Phantom, density, groel, load_structure, principal_axis, ribosome

STRUCTURES = Path(__file__).parents[3] / "shared" / "data" / "structures"
ATOM = "ATOM  {:>5}  {:<3} {:>3} A{:>4}    {:8.3f}{:8.3f}{:8.3f}  1.00 80.00          {:>2}\n"
BIOMT = "REMARK 350   BIOMT{row}   {n} {a:9.6f} {b:9.6f} {c:9.6f} {t:14.5f}\n"


def carbon(path: Path, positions: list[tuple[float, float, float]], head: str = "") -> Path:
    atoms = "".join(ATOM.format(i, "CA", "ALA", i, *p, "C") for i, p in enumerate(positions, 1))
    path.write_text(f"{head}{atoms}END\n")
    return path


def two_fold(path: Path, chain: str = "A") -> Path:
    """One carbon at (30, 0, 0), and an assembly that adds its image at (-30, 0, 0)."""
    head = "REMARK 350 BIOMOLECULE: 1\nREMARK 350 AUTHOR DETERMINED BIOLOGICAL UNIT: DIMERIC\n"
    head += f"REMARK 350 APPLY THE FOLLOWING TO CHAINS: {chain}\n"
    for n, sign in ((1, 1.0), (2, -1.0)):
        for row, axis in enumerate(np.diag([sign, sign, 1.0]), 1):
            head += BIOMT.format(row=row, n=n, a=axis[0], b=axis[1], c=axis[2], t=0.0)
    return carbon(path, [(30.0, 0.0, 0.0)], head)


def load(
    path: Path | str, box: int = 32, voxel_size: float = 4.0, resolution: float = 12.0, **options: object
) -> object:
    return load_structure(path, box=box, voxel_size=voxel_size, resolution=resolution, **options)


def peng_carbon(r: np.ndarray, resolution: float) -> np.ndarray:
    """Density of a carbon atom, blurred: five Gaussians (Peng et al. 1996, International Tables C 4.3.2.2)."""
    a = [0.0893, 0.2563, 0.7570, 1.0487, 0.3575]
    b = [0.2465, 1.7100, 6.4094, 18.6113, 50.2523]
    total = np.zeros_like(r)
    for weight, width in zip(a, b, strict=True):
        # exp(-b s^2 / 4) exp(-resolution^2 s^2) is exp(-c s^2): its transform in three dimensions.
        c = width / 4 + resolution**2
        total += weight * (np.pi / c) ** 1.5 * np.exp(-(np.pi**2) * r**2 / c)
    return total


@pytest.mark.parametrize("box", [32, 33])
def test_an_atom_has_its_electron_scattering_density(tmp_path: Path, box: int) -> None:
    structure = load(carbon(tmp_path / "one.pdb", [(11.3, -4.2, 50.1)]), box, 4.0, 24.0)
    axis = 4.0 * (np.arange(box) - box // 2)
    r = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    expected = peng_carbon(r, 24.0)
    # What lies beyond the Nyquist frequency of the voxels is exp(-9) of the transform; coordinates have three digits.
    assert np.abs(structure.density - expected).max() < 0.005 * expected.max()


def test_files_of_all_kinds_give_the_same(tmp_path: Path) -> None:
    positions = [(0.0, 0.0, 0.0), (20.0, 5.0, 0.0), (0.0, 30.0, -10.0)]
    pdb = carbon(tmp_path / "three.pdb", positions)
    zipped = tmp_path / "three.pdb.gz"
    zipped.write_bytes(gzip.compress(pdb.read_bytes()))
    cif = tmp_path / "three.cif"
    gemmi.read_structure(str(pdb)).make_mmcif_document().write_file(str(cif))
    first, *others = (load(path) for path in (pdb, zipped, cif))
    assert first.name == "three"
    assert "3 atoms" in first.source
    for other in others:
        np.testing.assert_allclose(other.density, first.density, atol=1e-6 * first.density.max())


def test_displacement_factors_and_empty_occupancies_do_not_count(tmp_path: Path) -> None:
    path = carbon(tmp_path / "one.pdb", [(0.0, 0.0, 0.0)])
    expected = load(path).density
    for old, new in ((" 80.00 ", "  5.00 "), ("  1.00 80.00", "  0.00  0.00")):
        changed = tmp_path / "changed.pdb"
        changed.write_text(path.read_text().replace(old, new))
        np.testing.assert_allclose(load(changed).density, expected, atol=1e-6 * expected.max())


def test_assemblies(tmp_path: Path) -> None:
    path = two_fold(tmp_path / "dimer.pdb")
    dimer, named, alone = load(path), load(path, assembly="1"), load(path, assembly="none")
    assert "assembly 1" in dimer.source
    assert "as in the file" in alone.source
    assert dimer.density.sum() == pytest.approx(2 * alone.density.sum(), rel=1e-3)
    np.testing.assert_array_equal(named.density, dimer.density)
    # 30 A are 7.5 voxels to either side along x.
    profile = dimer.density[16, 16]
    assert profile[16] < 0.1 * profile.max()
    assert np.sort(np.argsort(profile)[-4:]).tolist() == [8, 9, 23, 24]
    np.testing.assert_allclose(np.abs(dimer.axis), [1, 0, 0], atol=0.01)
    with pytest.raises(InputError, match="found no assembly '7', it has 1"):
        load(path, assembly="7")


def test_faults_of_structure_files(tmp_path: Path) -> None:
    garbage, empty, water = (tmp_path / name for name in ("garbage.pdb", "empty.cif", "water.pdb"))
    garbage.write_bytes(bytes(range(256)) * 4)
    empty.write_text("data_x\n_cell.length_a 1\n")
    water.write_text(ATOM.format(1, "O", "HOH", 1, 0, 0, 0, "O") + "END\n")
    broken = tmp_path / "broken.cif"
    broken.write_text("data_x\nloop_\n_a\n_b\n1 2 3\n")
    flat, unscaled = tmp_path / "flat.mrc", tmp_path / "unscaled.mrc"
    write_mrc(flat, np.zeros((8, 8, 8)), 4.0)
    write_mrc(unscaled, np.ones((8, 8, 8)), 0.0)
    odd = tmp_path / "structure.txt"
    odd.write_text("x")
    for path, words in [
        (garbage, "garbage.pdb: (found no atoms|cannot be read)"),
        (empty, "empty.cif: found no atoms"),
        (broken, "broken.cif: cannot be read as PDB or mmCIF"),
        (water, "no atoms but water"),
        (two_fold(tmp_path / "no_chain.pdb", chain="Z"), "assembly 1 is empty|assembly 1 cannot be made"),
        (flat, "flat.mrc: found no positive density"),
        (unscaled, "unscaled.mrc: no voxel size"),
        (odd, "ends in none of"),
        (tmp_path / "missing.pdb", "no such file, and no phantom"),
        ("grole", "phantoms: groel, groel-es, proteasome, ribosome, tmv, tric"),
    ]:
        with pytest.raises(InputError, match=words):
            load(path)


def test_without_gemmi_only_files_of_atoms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = carbon(tmp_path / "one.pdb", [(0.0, 0.0, 0.0)])
    write_mrc(tmp_path / "map.mrc", density(groel(), 32, 8.0), 8.0)
    monkeypatch.setitem(sys.modules, "gemmi", None)  # importing it raises ModuleNotFoundError
    for wanted in (path, tmp_path / "one.cif.gz"):
        wanted.write_bytes(path.read_bytes())
        with pytest.raises(InputError, match=rf"{wanted.name}: .*gemmi.*pip install 'faml-gpu\[simulate\]'"):
            load(wanted)
    assert load("groel", voxel_size=8.0, resolution=24.0).name == "groel"
    assert load(tmp_path / "map.mrc", voxel_size=8.0, resolution=24.0).name == "map.mrc"


def test_a_structure_has_to_fit_the_box(tmp_path: Path) -> None:
    path = carbon(tmp_path / "wide.pdb", [(-70.0, 0.0, 0.0), (70.0, 0.0, 0.0)])
    with pytest.raises(
        InputError, match=r"wide.pdb: reaches 73 A from its centre, the box of 32 voxels of 4 A only 64"
    ):
        load(path)
    with pytest.raises(InputError, match="to be shifted by up to 20 A"):
        load(path, box=40, room=20.0)
    with pytest.raises(InputError, match="groel: reaches 92 A"):
        load("groel")
    wide = np.zeros((60, 60, 60))
    wide[30, 30, 2:58] = 1
    write_mrc(tmp_path / "wide.mrc", wide, 4.0)
    with pytest.raises(InputError, match=r"wide.mrc: reaches 11\d A"):
        load(tmp_path / "wide.mrc")


def test_a_map_is_resampled_and_centred(tmp_path: Path) -> None:
    """A map of another voxel size, no cube, off its centre by fractions, against the structure evaluated."""
    phantom = groel()
    volume = density(phantom, 64, 5.0, shift=(2.4, -3.3, 1.7))[8:60, 5:62, 10:63]
    write_mrc(tmp_path / "map.mrc", volume, 5.0)
    found = load(tmp_path / "map.mrc", 24, 13.0, 39.0)
    expected = density(phantom, 24, 13.0, resolution=39.0)
    # Centred on what is above a tenth of the highest value, so not quite on the centre of all.
    assert np.linalg.norm(found.density - expected) < 0.05 * np.linalg.norm(expected)
    assert found.radius == pytest.approx(92, rel=0.1)


@pytest.mark.parametrize("box", [40, 41])
def test_phantoms_are_what_density_says(box: int) -> None:
    found = load("Ribosome", box, 8.0, 24.0)
    expected = density(ribosome(), box, 8.0, resolution=24.0)
    assert np.linalg.norm(found.density - expected) < 0.01 * np.linalg.norm(expected)
    assert found.radius == ribosome().radius


def test_a_filament_is_longer_than_the_box() -> None:
    found = load("tmv", 24, 12.0, 36.0)
    assert found.density.shape == (48, 48, 48)
    assert found.density[4, 24].max() > 0.5 * found.density.max()
    np.testing.assert_allclose(found.axis, [0, 0, 1], atol=0.02)


def test_principal_axis() -> None:
    """Of a rod, of a disc and of an uneven ellipsoid: the axis that is not like the other two."""
    rotation = Rotation.random(random_state=5).as_matrix()
    cases = [((1.0, 1.0, 4.0), 2), ((4.0, 4.0, 1.0), 2), ((1.0, 1.2, 4.0), 2), ((4.0, 1.0, 3.8), 1)]
    points = np.random.default_rng(0).standard_normal((4000, 3))
    points = np.concatenate([points, -points])
    for widths, which in cases:
        ellipsoid = Phantom("e", points * widths * 8, np.full(8000, 8.0), np.ones(8000), "C1", 100.0)
        axis = principal_axis(density(ellipsoid, 48, 5.0, rotation, (1.0, 2.0, -1.0)))
        assert abs(axis @ rotation[:, which]) > np.cos(np.deg2rad(3))
    np.testing.assert_allclose(principal_axis(density(groel(), 40, 6.0)), [0, 0, 1], atol=0.01)


needs_structures = pytest.mark.skipif(not STRUCTURES.is_dir(), reason=f"no {STRUCTURES}: real structures not checked")


@needs_structures
def test_groel_looks_like_groel(tmp_path: Path) -> None:
    """PDB 1KP8 on 1MNF: 14 subunits of 55 kDa, 145 A tall, 135 A wide, seven-fold about its axis, and hollow."""
    path = STRUCTURES / "GroEL_14mer_1KP8A_on_1MNF.pdb.gz"
    found = load(path, 64, 4.0, 12.0)
    axis = found.axis
    turn = Rotation.align_vectors([[0, 0, 1]], [axis])[0]
    z, y, x = 4.0 * (np.argwhere(found.density > 0.15 * found.density.max()).T - 32)
    along, *across = (turn.as_matrix() @ np.stack([x, y, z]))[::-1]
    assert np.ptp(along) == pytest.approx(145, rel=0.1)
    assert 2 * np.hypot(*across).max() == pytest.approx(140, rel=0.1)
    assert found.density[32, 32, 32] < 0.1 * found.density.max()
    # The integral is the scattering at zero angle, sum of Peng's a over the atoms.
    at_zero = {"C": 2.5088, "N": 2.2113, "O": 1.9826, "S": 5.1557}
    structure = gemmi.read_structure(str(path))
    expected = sum(at_zero[site.atom.element.name] for site in structure[0].all())
    assert found.density.sum(dtype=np.float64) * 4.0**3 == pytest.approx(expected, rel=0.01)
    # Symmetry, by turning the atoms about the axis.
    scores = []
    for degrees in (360 / 7, 180 / 7):
        moved = structure.clone()
        matrix = Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix()
        for site in moved[0].all():
            site.atom.pos = gemmi.Position(*(matrix @ np.array(site.atom.pos.tolist())))
        moved.make_mmcif_document().write_file(str(tmp_path / "turned.cif"))
        turned = load(tmp_path / "turned.cif", 64, 4.0, 12.0)
        scores.append(np.corrcoef(turned.density.ravel(), found.density.ravel())[0, 1])
    assert scores[0] > 0.95
    assert scores[1] < scores[0] - 0.1


@needs_structures
@pytest.mark.parametrize(
    ("name", "atoms", "radius"),
    [("1AON.pdb.gz", 58870, 118), ("4V5D_one70S.cif.gz", 148020, 156), ("3J9I_20S.pdb.gz", 46228, 94)],
)
def test_real_structures_are_read(name: str, atoms: int, radius: float) -> None:
    found = load(STRUCTURES / name, 32, 12.0, 36.0)
    assert f"{atoms} atoms" in found.source
    assert found.radius == pytest.approx(radius, abs=1)
    axis = 12.0 * (np.arange(32) - 16)
    mass = np.maximum(found.density, 0)
    centre = [(mass.sum(axis=tuple({0, 1, 2} - {a})) * axis).sum() / mass.sum() for a in range(3)]
    np.testing.assert_allclose(centre, 0, atol=1.5)
