"""What the solver takes of memory, so that a caller can choose how many heads it hands over at a time."""

from vllm_kvcompress.matching.reference import chunk_bytes_on, query_chunk

# What heads and parts of them are solved for with at a time, but with one head's at least: what stays in a
# core's own cache, and elsewhere what is worth the launches of kernels.
SOLVE_BYTES, DEVICE_SOLVE_BYTES = 2**23, 2**29


def solve_bytes_on(device_type: str) -> int:
    """What solving for several heads at a time, or for several parts of them, may take."""
    return SOLVE_BYTES if device_type == "cpu" else DEVICE_SOLVE_BYTES


def peak_bytes(
    heads: int,
    tokens: int,
    queries: int,
    columns: int,
    size: int,
    *,
    omp: bool = False,
    chunk_bytes: int,
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


def parts_of(tokens: int, columns: int, most: int, most_columns: int | None = None) -> int:
    """Into how many parts of equal length a head is cut.

    Args:
        tokens: T.
        columns: t, those that are kept.
        most: tokens of a part, at most.
        most_columns: kept columns of a part, on average; None for any number.
    """
    return max(-(-tokens // most), 1 if most_columns is None else min(tokens, -(-columns // most_columns)))


def whole_bytes(heads: int, tokens: int, queries: int, columns: int, size: int) -> int:
    """What is held beside the parts of long heads: all queries and the heads' attention, in float32.

    Args:
        heads: X.
        tokens: T, of all parts.
        queries: n, without those of the kept columns.
        columns: t, of all parts.
        size: D.
    """
    return 4 * heads * ((queries + columns) * (2 * size + 3) + 2 * tokens * size)


def parts_at_once(
    heads: int,
    tokens: int,
    length: int,
    queries: int,
    columns: int,
    width: int,
    size: int,
    device_type: str,
    *,
    omp: bool = False,
) -> int:
    """Parts of long heads that are solved for together, at least one.

    Args:
        heads: X.
        tokens: T, of all parts.
        length: tokens of a part.
        queries: n, without those of the kept columns.
        columns: t, of all parts.
        width: kept columns of a part, at most.
        size: D.
        device_type: as of `torch.device.type`.
        omp: as of `peak_bytes`.
    """
    room = solve_bytes_on(device_type) - whole_bytes(heads, tokens, queries, columns, size)
    chunk, own = chunk_bytes_on(device_type), queries + width
    parts = 1
    while parts * length < tokens:
        rows = heads * (parts + 1)
        copies = 4 * rows * (2 * length + own) * size
        if copies + peak_bytes(rows, length, own, width, size, omp=omp, chunk_bytes=chunk) > room:
            break
        parts += 1
    return parts
