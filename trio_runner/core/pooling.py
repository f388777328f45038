"""What happens to the vector of an embedding after the model made it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def normalize(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of `vector`, shape (n,), scaled to Euclidean length 1; the zero vector stays as it is."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector.copy() if length == 0.0 else (vector / length).astype(np.float32)
