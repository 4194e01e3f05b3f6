"""Off-screen rendering of a LIBERO scene."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

RENDERERS = ("fast", "exact")
_PIXEL = 0.77
"""Width (m) of what the agent's view shows at the arm's distance, about 0.9 m."""
_COLLISION_GROUP, _HIDDEN_GROUP = 0, 5
"""Of MuJoCo's six groups of shapes. robosuite and LIBERO use 0 and 1."""


@contextmanager
def _coarse_arm(model: Any, cell: float) -> Iterator[None]:
    """Within this, the meshes of the arm and its mount hold one vertex per cube of edge `cell` (m).

    The Panda's meshes are made for close-ups: 180,000 triangles, more than nine tenths of a LIBERO scene.
    """
    fields = (model.mesh_vert, model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord, model.mesh_facenum)
    originals = [field.copy() for field in fields]
    for index in range(model.nmesh):
        # The last link is left as it is: it is close to the camera in the hand.
        if model.mesh(index).name.startswith(("robot0", "mount0")) and "link7" not in model.mesh(index).name:
            vertices = model.mesh_vert[model.mesh_vertadr[index] :][: model.mesh_vertnum[index]]
            triangles = slice(model.mesh_faceadr[index], model.mesh_faceadr[index] + model.mesh_facenum[index])
            representatives, means, rows, corners = _cluster(
                vertices.tobytes(), model.mesh_face[triangles].tobytes(), cell
            )
            vertices[representatives] = means
            model.mesh_face[triangles][: len(rows)] = corners
            for field in (model.mesh_facenormal, model.mesh_facetexcoord):
                field[triangles][: len(rows)] = field[triangles][rows]
            model.mesh_facenum[index] = len(rows)
    try:
        yield
    finally:
        for field, original in zip(fields, originals, strict=True):
            field[:] = original


@cache  # every scene has the same arm
def _cluster(vertex_data: bytes, triangle_data: bytes, cell: float) -> tuple[NDArray[Any], ...]:
    """Merge the vertices of each cube of a grid, and drop the triangles that lose their area or are double.

    Returns:
        One vertex per occupied cube (n,), the mean of the cube's vertices (n, 3), the rows of the triangles that
        stay (m,), and their new corners (m, 3).
    """
    vertices = np.frombuffer(vertex_data, np.float32).reshape(-1, 3)
    triangles = np.frombuffer(triangle_data, np.int32).reshape(-1, 3)
    cubes = np.floor(vertices / cell).astype(np.int64) + 2**20
    keys = (cubes[:, 0] << 42) + (cubes[:, 1] << 21) + cubes[:, 2]
    _, representatives, cluster, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(cluster, vertices[:, axis]) / counts for axis in range(3)], axis=1)
    merged = np.sort(cluster[triangles], axis=1)
    _, rows = np.unique((merged[:, 0] << 42) + (merged[:, 1] << 21) + merged[:, 2], return_index=True)
    rows = np.sort(rows[(merged[rows, 0] != merged[rows, 1]) & (merged[rows, 1] != merged[rows, 2])])
    return representatives, means, rows, representatives[cluster[triangles[rows]]]


class SceneRenderer:
    """Renders square pictures of the current state.

    "exact" gives LIBERO's own pictures. "fast" leaves out reflections, multisampling, and the detail of the arm that
    is smaller than a pixel of the agent's view; and it draws nothing that lies beside or behind the camera, which
    changes no pixel. Use the same one for training and evaluation.

    Args:
        model, data: MuJoCo's.
        image_size: edge of the pictures in pixels.
        renderer: one of `RENDERERS`.
    """

    def __init__(self, model: Any, data: Any, image_size: int, renderer: str) -> None:
        import mujoco

        self._mujoco, self._model, self._data, self._size = mujoco, model, data, image_size
        # These are read when the context is made; afterwards they have no effect.
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if renderer == "fast":
            model.vis.quality.offsamples = 0
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0
        # mujoco.Renderer takes the back end that was set when mujoco was first imported, perhaps not by us.
        self._gl = import_module(f"mujoco.{os.environ['MUJOCO_GL']}").GLContext(image_size, image_size)
        self._gl.make_current()
        with _coarse_arm(model, _PIXEL / image_size) if renderer == "fast" else nullcontext():
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)  # uploads the meshes
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
        if renderer == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options, self._perturbation, self._camera = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        self._options.geomgroup[[_COLLISION_GROUP, _HIDDEN_GROUP]] = 0
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._area = mujoco.MjrRect(0, 0, image_size, image_size)
        # What is not in sight can still be seen in a mirror, or by its shadow.
        self._culls = renderer == "fast" and not model.light_castshadow.any()

    def render(self, camera: str) -> NDArray[np.uint8]:
        """One picture, uint8 RGB (H, W, 3), upright: LIBERO's frame turned by 180 degrees, as OpenVLA does."""
        mujoco, number = self._mujoco, self._model.camera(camera).id
        self._camera.fixedcamid = number
        with self._only_in_sight(number) if self._culls else nullcontext():
            mujoco.mjv_updateScene(
                self._model,
                self._data,
                self._options,
                self._perturbation,
                self._camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self._scene,
            )
        self._gl.make_current()
        pixels = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_render(self._area, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, self._area, self._context)
        return np.ascontiguousarray(pixels[::-1, ::-1])

    @contextmanager
    def _only_in_sight(self, camera: int) -> Iterator[None]:
        """Within this, shapes whose bounding sphere lies outside the camera's view belong to a hidden group."""
        model, data = self._model, self._data
        # In the camera's frame: x to the right, y up, the view along -z.
        x, y, z = ((data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).T
        half = np.deg2rad(model.cam_fovy[camera]) / 2  # the picture is square
        beside = np.maximum(np.abs(x), np.abs(y)) * np.cos(half) + z * np.sin(half)  # m beyond the nearest side plane
        outside = (np.maximum(beside, z) > model.geom_rbound) & (model.geom_rbound > 0)  # a plane has no bound
        groups = model.geom_group.copy()
        model.geom_group[outside] = _HIDDEN_GROUP
        try:
            yield
        finally:
            model.geom_group[:] = groups

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._context is not None:
            # Object numbers are the context's own: freed while another is current, they would delete its objects.
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit the library may be gone
            self.close()
