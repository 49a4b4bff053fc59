"""The weights with which neighbours average, and how fast they agree."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import networkx as nx


Mixing = Literal["uniform", "metropolis"]


def mixing_matrix(
    graph: "nx.Graph", *, mixing: Mixing = "uniform", self_weight: float = 0.5
) -> npt.NDArray[np.float64]:
    """Return W, float64 `[N, N]`: row i holds the weights that node i applies, and sums to 1.

    Args:
        graph: Nodes 0...N-1.
        mixing: "uniform": W_ii = self_weight, the neighbours share the rest. "metropolis"
            (Metropolis-Hastings): W_ij = 1 / (1 + max(d_i, d_j)) with the degrees d, and W_ii what
            is left; symmetric, so the mean over the nodes stays what it was.
        self_weight: Of "uniform" alone. A node without neighbours has W_ii = 1 in any case.

    Example:
        >>> import networkx as nx
        >>> mixing_matrix(nx.path_graph(3)).tolist()
        [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]
    """
    matrix = np.zeros((len(graph), len(graph)))
    for node in range(len(graph)):
        degree = len(graph[node])
        for other in graph[node]:
            matrix[node, other] = (
                1 / (1 + max(degree, len(graph[other])))
                if mixing == "metropolis"
                else (1 - self_weight) / degree
            )
        fixed = mixing == "uniform" and degree
        matrix[node, node] = self_weight if fixed else 1 - matrix[node].sum()
    return matrix


def spectral_gap(matrix: npt.NDArray[np.float64]) -> float:
    """Return 1 minus the second largest modulus of an eigenvalue of a row-stochastic matrix.

    A round of averaging shrinks the distance to consensus by about 1 - gap in the long run; 0 means
    that it never goes away. Exact and O(N^3): a fraction of a second for a symmetric matrix of
    1,000 nodes, some times that otherwise.
    """
    if len(matrix) < 2:
        return 1.0
    is_symmetric = np.array_equal(matrix, matrix.T)
    eigenvalues = np.linalg.eigvalsh(matrix) if is_symmetric else np.linalg.eigvals(matrix)
    return float(max(0.0, 1 - np.sort(np.abs(eigenvalues))[-2]))
