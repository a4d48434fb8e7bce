"""Meshes from volumes: marching cubes, and files that other programs open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

SUFFIXES = (".glb", ".obj", ".ply", ".stl")


@dataclass(frozen=True)
class Mesh:
    """Triangles.

    Attributes:
        vertices: float32 ``[V, 3]``, in the volume's coordinates.
        faces: int ``[F, 3]``; seen from outside, corners go round counter-clockwise.
    """

    vertices: np.ndarray
    faces: np.ndarray

    def save(self, path: str | Path) -> Path:
        """Write a file of a format of :data:`SUFFIXES`; returns the path. Needs trimesh."""
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"a mesh is written as {', '.join(SUFFIXES)}, got {str(path)!r}")
        import trimesh

        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.Trimesh(self.vertices, self.faces, process=False).export(path)
        return path


def mesh_of(volume: Tensor, bounds: float = 1.01, level: float = 0.0) -> Mesh:
    """The surface where a field crosses a level, by marching cubes of scikit-image.

    Args:
        volume: ``[n, n, n]``, larger inside.
        bounds: half the side of the volume.
        level: value at the surface.

    Raises:
        ValueError: on a volume with inf or NaN, or without a surface.
    """
    from skimage.measure import marching_cubes

    if volume.dim() != 3:
        raise ValueError(f"volume must be [n, n, n], got {list(volume.shape)}")
    if not bool(volume.isfinite().all()):
        raise ValueError("the volume holds inf or NaN: decode it again with exact attention (engine 'sdpa')")
    field = volume.float().cpu().numpy()
    low, high = float(field.min()), float(field.max())
    if not low < level < high:
        raise ValueError(
            f"there is no surface: the field goes from {low:.4g} to {high:.4g} and never crosses {level:g}"
        )
    vertices, faces, _, _ = marching_cubes(field, level)
    sides = np.array(field.shape) - 1
    # scikit-image winds the corners so that, of a field that is larger inside, faces look inwards.
    return Mesh((vertices / sides * 2 * bounds - bounds).astype(np.float32), faces[:, ::-1].copy())
