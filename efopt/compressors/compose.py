"""Composition: the values of one compressor, written by another."""

from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import identity


def compose(outer: Compressor, inner: Compressor) -> Compressor:
    """Compresses the values that another compressor sends once more.

    ``compose(top_k(fraction=0.01), quantize(bits=4))`` sends the largest coordinates in
    four bits each; ``compose(power_sgd(rank=4), cast("bfloat16"))`` the factors in half
    the bytes. Blocks of the inner compressor are cut from the values of one block of
    the outer one. Unless ``inner`` is linear, payloads cannot be summed: they are
    gathered.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: that of ``outer``, with the values replaced by the payload of ``inner``.
    Cost: that of ``inner`` for the values, and what ``outer`` sends beside them.
    Properties: contractions multiply: ``delta = delta_outer * delta_inner``; so do
    variances of an unbiased pair, ``1 + omega = (1 + omega_outer) (1 + omega_inner)``;
    linear if both are, else not linear. Around
    :func:`efopt.power_sgd` nothing is promised but conservation. A pair that is neither
    (a biased ``outer`` with an ``inner`` of ``omega >= 1``) declares no factor.
    Placement: that of ``outer``.

    Args:
      outer: A sparse or low-rank compressor.
      inner: A compressor with one message a step and no state.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If one of them is no :class:`efopt.Compressor`, the payload of
        ``outer`` has no values, or ``inner`` speaks in rounds, has state or is a
        partition.
      ValueError: If the values of ``outer`` are compressed already.

    Examples:
      >>> import efopt
      >>> tx = efopt.compose(efopt.top_k(k=64), efopt.quantize(bits=4))
      >>> tx.payload_bits((4096,)), efopt.top_k(k=64).payload_bits((4096,))
      (1040, 2816)
    """
    for name, value in (("outer", outer), ("inner", inner)):
        if not isinstance(value, Compressor):
            raise TypeError(
                f"`compose({name})` takes an `efopt.Compressor`, got {value!r}."
            )
    codec = inner.codec
    if not codec.one_message or codec.stateful:
        raise TypeError(
            f"`compose(..., {inner})` makes no sense: the inner compressor must have "
            "one message a step and no state."
        )
    if getattr(outer.codec, "values", identity().codec) != identity().codec:
        raise ValueError(
            f"`compose({outer}, ...)`: its values are compressed already; give one "
            "inner compressor."
        )
    return make(outer.codec.with_values(codec))
