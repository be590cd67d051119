"""What the solver takes of memory, so that a caller can choose how many heads it hands over at a time."""

from vllm_kvcompress.matching.reference import CHUNK_BYTES, query_chunk


def peak_bytes(
    heads: int,
    tokens: int,
    queries: int,
    columns: int,
    size: int,
    *,
    omp: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """The most memory that `attend`, a selection and `fit` take in turn, beside the problem itself.

    Args:
        heads: X.
        tokens: T.
        queries: n.
        columns: t.
        size: D.
        omp: whether `select_omp` is among them, which holds the softmax of all queries over all tokens.
        chunk_bytes: as given to `attend` and `select_omp`; without the latter, T counts beyond it only by the
            problem's own size.
    """
    chunk = query_chunk(heads, queries, tokens, chunk_bytes) * tokens
    reference = queries * (size + 3) + tokens
    inputs = (2 * tokens + queries) * size  # as float32
    system = 5 * columns * columns
    attend = inputs + 3 * chunk + 2 * tokens
    fit = queries * (2 * size + 2 * columns + columns // 2) + 4 * columns * size + system + tokens
    most = max(attend, fit)
    if omp:
        chosen = 2 * queries * columns
        most = max(most, queries * tokens + max(inputs + 3 * chunk, chosen + system + 4 * tokens))
    return 4 * heads * (reference + most)
