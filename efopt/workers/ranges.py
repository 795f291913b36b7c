"""Who owns what: consecutive ranges of blocks, one a worker, all of one length."""


def range_size(num_blocks: int, num_workers: int) -> int:
    """Blocks that each of ``num_workers`` owns of ``num_blocks``; the last ones fewer.

    The ranges are of equal length, so that ``range_size * num_workers - num_blocks``
    blocks at the end of the last ones are padding.
    """
    return -(-num_blocks // num_workers)
