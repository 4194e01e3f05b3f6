"""The stand-in assets: written once, complete for their suites, and the same interface and sizes as LIBERO's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from infovla_peft.simulation.primitive import SUITES, build_primitive_assets, primitive_asset_files

FILES = primitive_asset_files()
THINGS = sorted(path for path in FILES if not path.startswith("scenes/"))


def compiled(text: str) -> tuple[Any, Any]:
    """A thing alone, its meshes and textures left out, compiled as robosuite does it: only group 0 weighs."""
    mujoco = pytest.importorskip("mujoco")
    root = ElementTree.fromstring(text)
    for tag in ("asset", "compiler", "size"):
        for element in root.findall(tag):
            root.remove(element)
    for parent in list(root.iter()):
        for geom in parent.findall("geom"):
            geom.attrib.pop("material", None)
            if geom.get("type") == "mesh" or geom.get("mesh"):
                parent.remove(geom)
    ElementTree.SubElement(root, "compiler", {"angle": "radian", "inertiagrouprange": "0 0"})
    outer = root.find("worldbody/body")
    assert outer is not None
    ElementTree.SubElement(outer, "freejoint")
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def names(model: Any, kind: str) -> list[str]:
    count = {"joint": model.njnt, "body": model.nbody, "site": model.nsite}[kind]
    return [getattr(model, kind)(index).name for index in range(count)]


def collision_box(model: Any, data: Any) -> np.ndarray:
    """Lower and upper corner of the collision shapes, relative to the body that LIBERO places."""
    corners = []
    for geom in np.flatnonzero(model.geom_group == 0):
        half = model.geom_size[geom].copy()
        if model.geom_type[geom] == 3:  # capsule
            half = np.array([half[0], half[0], half[0] + half[1]])
        reach = np.abs(data.geom_xmat[geom].reshape(3, 3)) @ half
        corners += [data.geom_xpos[geom] - reach, data.geom_xpos[geom] + reach]
    return np.array([np.min(corners, axis=0), np.max(corners, axis=0)]) - data.body("object").xpos


def test_written_once_and_rewritten_when_stale(tmp_path: Path) -> None:
    folder = build_primitive_assets(tmp_path / "assets")
    written = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(FILES) == set(written) - {"PRIMITIVE_ASSETS_VERSION"}
    assert all(written[path].read_text(encoding="utf-8") == text for path, text in FILES.items())
    bowl = written["stable_scanned_objects/akita_black_bowl/akita_black_bowl.xml"]
    before = bowl.stat().st_mtime_ns
    assert build_primitive_assets(folder) == folder
    assert bowl.stat().st_mtime_ns == before
    (folder / "PRIMITIVE_ASSETS_VERSION").write_text("an older version\n")
    bowl.unlink()
    build_primitive_assets(folder)
    assert bowl.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


def test_default_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path))
    assert build_primitive_assets().parent == tmp_path


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no primitive assets"):
        build_primitive_assets(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_nothing_but_primitives() -> None:
    for path, text in FILES.items():
        root = ElementTree.fromstring(text)
        assert not list(root.iter("mesh")), path
        assert {geom.get("type") for geom in root.iter("geom")} <= {"box", "cylinder", "ellipsoid", "plane"}, path
        assert all(texture.get("builtin") for texture in root.iter("texture")), path
    assert primitive_asset_files() == FILES


@pytest.mark.parametrize("path", THINGS)
def test_solid_parts_weigh_and_painted_ones_do_not_collide(path: str) -> None:
    model, _ = compiled(FILES[path])
    drawn = model.geom_group == 1
    assert not (model.geom_contype[drawn] | model.geom_conaffinity[drawn]).any()
    assert (model.geom_contype[~drawn] & model.geom_conaffinity[~drawn]).all()
    assert drawn.any()
    assert not drawn.all()


@pytest.mark.libero
@pytest.mark.parametrize("suite", SUITES)
def test_every_category_of_the_suite_has_a_file(suite: str) -> None:
    from infovla_peft.simulation.suites import suite_tasks

    known = {Path(path).stem for path in THINGS} | {
        "table",
        "floor",
        "kitchen_table",
        "living_room_table",
        "study_table",
    }
    scenes = {"tabletop": "tabletop", "floor": "floor", "kitchen_tabletop": "kitchen_tabletop"}
    scenes |= {"living_room_tabletop": "living_room_tabletop", "study_tabletop": "study"}
    for task in suite_tasks(suite):
        text = task.bddl_file.read_text(encoding="utf-8")
        declared = re.findall(r"\(:(?:fixtures|objects)\s(.*?)\)", text, flags=re.DOTALL)
        categories = set(re.findall(r" - (\w+)", " ".join(declared)))
        assert categories
        assert categories <= known, task
        problem = re.search(r"problem LIBERO_(\w+)_Manipulation", text)
        assert problem is not None
        assert f"scenes/libero_{scenes[problem[1].lower()]}_base_style.xml" in FILES, task


@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suite", "index"), [("libero_goal", 3), ("libero_object", 0), ("libero_spatial", 4)])
def test_a_task_builds_and_its_start_state_comes_to_rest(suite: str, index: int, tmp_path: Path) -> None:
    from infovla_peft.simulation.assets import find_assets
    from infovla_peft.simulation.environment import LiberoEnvironment
    from infovla_peft.simulation.suites import find_task

    assets = find_assets("primitive", tmp_path / "assets")
    with LiberoEnvironment(find_task(suite, index), assets=assets) as environment:
        environment.reset(initial_state=0, seed=0)
        before = environment.state().simulation
        for _ in range(20):
            success = environment.step([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
        after = environment.state().simulation
        model = environment.env.sim.model._model
        assert not success
        assert before.shape == (1 + model.nq + model.nv,)
        arm = 9  # seven joints, two fingers
        assert np.abs(after - before)[1 + arm : 1 + model.nq].max() < 5e-3
        assert np.abs(after[1 + model.nq + arm :]).max() < 0.05


@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suite", SUITES)
def test_every_task_builds_with_the_state_layout_of_the_benchmark(suite: str, tmp_path: Path) -> None:
    from infovla_peft.simulation.assets import find_assets
    from infovla_peft.simulation.environment import LiberoEnvironment
    from infovla_peft.simulation.suites import suite_tasks

    assets = find_assets("primitive", tmp_path / "assets")
    for task in suite_tasks(suite):
        with LiberoEnvironment(task, assets=assets) as environment:
            environment.reset(initial_state=0, seed=0)
            assert not environment.success(), task
            environment.reset(seed=0)
            assert not environment.success(), task


@pytest.mark.shared
@pytest.mark.parametrize("path", THINGS)
def test_same_interface_and_sizes_as_the_official_thing(path: str, shared: Path) -> None:
    """Names, joints, regions and sampler sites equal; collision shapes within 8 mm; mass within 2 %."""
    ours, our_data = compiled(FILES[path])
    theirs, their_data = compiled((shared / "libero" / "assets" / path).read_text(encoding="utf-8"))
    for kind in ("joint", "body"):
        assert names(ours, kind) == names(theirs, kind)
    assert sorted(names(ours, "site")) == sorted(names(theirs, "site"))
    for field in ("jnt_type", "jnt_axis", "jnt_pos", "jnt_range", "dof_damping", "dof_frictionloss"):
        np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), err_msg=field)
    origin, their_origin = our_data.body("object").xpos, their_data.body("object").xpos
    for name in names(ours, "site"):
        if name == "burner":  # only seen
            continue
        position, their_position = our_data.site(name).xpos - origin, their_data.site(name).xpos - their_origin
        if name in ("bottom_site", "top_site", "horizontal_radius_site"):
            position, their_position = ours.site(name).pos, theirs.site(name).pos
        else:
            np.testing.assert_allclose(ours.site(name).size, theirs.site(name).size, err_msg=name)
            np.testing.assert_allclose(our_data.site(name).xmat, their_data.site(name).xmat, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(position, their_position, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(collision_box(ours, our_data), collision_box(theirs, their_data), atol=0.008)
    if not path.startswith("articulated_objects/") and "rack" not in path:
        np.testing.assert_allclose(ours.body_mass.sum(), theirs.body_mass.sum(), rtol=0.02)
