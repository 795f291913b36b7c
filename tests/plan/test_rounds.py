"""Plans of rounds: bytes of a step, the time of a round, and how long one should be."""

import jax
import numpy as np
import pytest

import efopt
from efopt.wire import Network, plan
from efopt.wire.__main__ import main

SIGN = efopt.scaled_sign(1024)
PARAMS = {f"layer_{i}": jax.ShapeDtypeStruct((256, 128), np.float32) for i in range(12)}


def test_a_round_is_its_meetings_and_the_computation_of_its_steps():
    whole = plan(SIGN, PARAMS, num_workers=4, bandwidth=1e6)
    rounds = plan(
        SIGN,
        PARAMS,
        num_workers=4,
        bandwidth=1e6,
        compute_seconds=0.25,
        compress_seconds=0.5,
        every=10,
    ).rounds
    sent = whole.bytes_sent_per_worker
    assert rounds.meetings == (whole.report,) and rounds.peak_bytes == sent
    assert rounds.bytes_per_step == sent / 10
    assert rounds.exchange_seconds == whole.exchange_seconds
    assert rounds.round_seconds == pytest.approx(2.5 + 0.5 + 8 * sent / 1e6)
    assert rounds.step_seconds == pytest.approx(rounds.round_seconds / 10)
    n = rounds.balanced_every
    assert (n - 1) * 0.25 < rounds.exchange_seconds <= n * 0.25
    n, meetings = rounds.every_within(0.1), rounds.exchange_seconds + 0.5
    assert (n - 1) * 0.025 < meetings <= n * 0.025
    assert f"a tenth of it from {n} on" in rounds.verdict
    with pytest.raises(ValueError, match="above 0"):
        rounds.every_within(0.0)


def test_fragments_part_the_peak_and_not_the_sum():
    whole = plan(SIGN, PARAMS, num_workers=4)
    rounds = plan(SIGN, PARAMS, num_workers=4, every=10, fragments=3).rounds
    assert len(rounds.meetings) == 3
    assert rounds.peak_bytes == rounds.bytes_per_round / 3
    assert rounds.bytes_per_round == whole.bytes_sent_per_worker
    assert (
        rounds.balanced_every is rounds.every_within(0.1) is None
    )  # without a bandwidth


def test_by_label_each_leaf_is_compressed_as_in_the_whole_tree():
    compressor = efopt.compressors.partition(
        {"sign": SIGN, "bits": efopt.quantize(8, block_size=256)},
        lambda tree: {k: "bits" if k == "layer_3" else "sign" for k in tree},
    )
    labels = {k: "late" if k in ("layer_3", "layer_4") else "early" for k in PARAMS}
    rounds = plan(compressor, PARAMS, num_workers=4, every=10, fragments=labels).rounds
    early, late = (r.operand_bytes for r in rounds.meetings)
    size = 256 * 128
    assert early == 10 * (size // 8 + size // 1024 * 4)
    assert late == size // 8 + size // 1024 * 4 + size + size // 256 * 2


def test_on_a_mesh_it_is_about_the_card_on_the_slow_axis():
    made = plan(
        SIGN,
        PARAMS,
        mesh={"dcn": 2, "fsdp": 4},
        axis_name="dcn",
        params_specs=jax.P("fsdp"),
        networks={"dcn": Network(1e9)},
        devices_per_card={"dcn": 2},
        every=4,
        fragments=2,
    )
    assert made.rounds.bytes_per_round == made.bytes_per_card
    assert made.rounds.peak_bytes == made.bytes_per_card // 2


def test_it_is_printed_and_asked_for_from_a_shell(capsys):
    main(
        "plan scaled_sign(1024) --shapes 256x128 256x128 --workers 4 --every 8 "
        "--fragments 2 --bandwidth 1Mbit/s --compute 10ms".split()
    )
    said = capsys.readouterr().out
    assert "rounds of 8 steps, meetings: 2" in said
    assert "dense float32 at every step. From rounds of " in said


@pytest.mark.parametrize(
    "options, said",
    [
        ({"every": 0}, r"plan\(every=\.\.\.\)` must be at least 1"),
        ({"fragments": 2}, "goes with `every`"),
        ({"every": 2, "fragments": 3}, "are 3, each with a step of its own"),
        ({"every": 2, "fragments": {"layer_1": 0}}, "every leaf of the parameters"),
    ],
)
def test_rounds_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        plan(SIGN, PARAMS, num_workers=4, **options)
