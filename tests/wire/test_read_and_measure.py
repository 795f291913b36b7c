"""What `efopt.wire` reads: texts of every backend, and real compiles on 8 devices.

Texts marked "from" are excerpts of what that compiler printed, without metadata and
most of the configuration, and shortened where they say so. Those marked "by hand" only
follow the form that is named.
"""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt
from efopt import wire

ALL_8 = "replica_groups={{0,1,2,3,4,5,6,7}}"

# ---------------------------------------------------------------- texts by backend

# From jax 0.10.2, CPU: an all_to_all is a tuple of pieces.
CPU_TUPLE = """
ENTRY %main.0_spmd (param.1: u32[4,512]) -> u32[4,512] {
  %wrapped_slice.2 = u32[1,512]{1,0} fusion(%param.1), kind=kLoop, calls=%wrapped_slice_computation.2
  %wrapped_slice.3 = u32[1,512]{1,0} fusion(%param.1), kind=kLoop, calls=%wrapped_slice_computation.3
  %wrapped_slice = u32[1,512]{1,0} fusion(%param.1), kind=kLoop, calls=%wrapped_slice_computation
  %wrapped_slice.1 = u32[1,512]{1,0} fusion(%param.1), kind=kLoop, calls=%wrapped_slice_computation.1
  %all-to-all = (u32[1,512]{1,0}, u32[1,512]{1,0}, u32[1,512]{1,0}, u32[1,512]{1,0}) all-to-all(%wrapped_slice, %wrapped_slice.1, %wrapped_slice.2, %wrapped_slice.3), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %get-tuple-element = u32[1,512]{1,0} get-tuple-element(%all-to-all), index=0
"""  # noqa: E501

# From jax 0.12.0.1, CPU: groups by the axes of the mesh, and an index every 5 operands.
CPU_MESH = """
ENTRY %main.0_spmd (param.8: f32[4,10], param.9: f32[4,11], param.10: f32[4,12], param.11: f32[4,13], param.12: f32[4,14], param.13: f32[4,15], param.14: f32[4,16], param.15: f32[4,17]) -> (f32[4,10], f32[4,11], f32[4,12], f32[4,13], f32[4,14], /*index=5*/f32[4,15], f32[4,16], f32[4,17]) {
  %param.8 = f32[4,10]{1,0} parameter(0)
  %param.9 = f32[4,11]{1,0} parameter(1)
  %param.10 = f32[4,12]{1,0} parameter(2)
  %param.11 = f32[4,13]{1,0} parameter(3)
  %param.12 = f32[4,14]{1,0} parameter(4)
  %param.13 = f32[4,15]{1,0} parameter(5)
  %param.14 = f32[4,16]{1,0} parameter(6)
  %param.15 = f32[4,17]{1,0} parameter(7)
  ROOT %all-reduce = (f32[4,10]{1,0}, f32[4,11]{1,0}, f32[4,12]{1,0}, f32[4,13]{1,0}, f32[4,14]{1,0}, /*index=5*/f32[4,15]{1,0}, f32[4,16]{1,0}, f32[4,17]{1,0}) all-reduce(%param.8, %param.9, %param.10, %param.11, %param.12, /*index=5*/%param.13, %param.14, %param.15), channel_id=1, replica_groups=mesh['model'=2,'data'=4] {'data'}, use_global_device_ids=true, to_apply=%region_0.0
}
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:2x4: layouts with tiles and memory spaces.
TPU_ALL_TO_ALL = """
ENTRY %main.0_spmd (param.2: u32[8,65536], param.3: bf16[2048,2048]) -> (u32[8,65536], bf16[2048,2048]) {
  %all_to_all.8 = u32[8,1,65536]{2,1,0:T(1,128)} reshape(%param.2)
  %all-to-all-start = ((u32[8,1,65536]{2,1,0:T(1,128)}), u32[8,1,65536]{2,1,0:T(1,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%all_to_all.8), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %all-to-all-done = u32[8,1,65536]{2,1,0:T(1,128)S(1)} all-to-all-done(%all-to-all-start)
}
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:2x4.
TPU_PERMUTE = """
  %param.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %collective-permute-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%param.1), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}, backend_config={"flag_configs":[]}
  %collective-permute-done = f32[8,128]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start)
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:2x4, two programs: layouts with two and three levels of
# tiles, the second with two elements to the byte.
TPU_NARROW = """
%first (param.1: bf16[1000]) -> bf16[1000] {
  %param.1 = bf16[1000]{0:T(1024)(128)(2,1)} parameter(0)
  ROOT %psum_invariant.7 = bf16[1000]{0:T(1024)(128)(2,1)} all-reduce(%param.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%region_0.0, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"CUSTOM","id":"0"}}
}

%second (param.1: s4[4096]) -> s4[32768] {
  %param.1 = s4[4096]{0:T(1024)(128)(8,1)E(4)} parameter(0)
  %all-gather.5 = s4[32768]{0:T(1024)(128)(8,1)E(4)S(1)} all-gather(%param.1), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={async_collective_name="all-gather-start"}, backend_config={"collective_algorithm_config":{"emitter":"1DAllGatherOnMajorDim","debug":"\\ngroup_size = 8 \\nhas_reordering_map: true \\nper_stride_size = 2048 bytes \\nshard_size = 2048 bytes "}}
}
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:8x8: an all_gather of u32[4096] is an all-reduce of a
# zero-padded buffer. Here the groups are cut from a list of 64 workers to {}.
TPU_PADDED = """
HloModule jit_f, is_scheduled=true, num_partitions=64
  %dynamic-update-slice = u32[262144]{0:T(1024)S(1)} dynamic-update-slice(%broadcast, %copy-done, %multiply.1), backend_config={"flag_configs":[]}
  %all-reduce = u32[262144]{0:T(1024)S(1)} all-reduce(%dynamic-update-slice), channel_id=2, replica_groups={}, use_global_device_ids=true, to_apply=%add
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:2x4, tuples shortened: one all_gather, spread over a start,
# a step that computes meanwhile, and a done.
TPU_FUSED = """
%fused_computation.5 (param_0.12: u32[131072]) -> (u32[131072], u32[1048576], s32[2], u32[], u32[], /*index=5*/u32[], u32[], u32[], u32[]) {
  %param_0.12 = u32[131072]{0:T(1024)} parameter(0)
  %all-gather.6 = u32[1048576]{0:T(1024)} all-gather(%param_0.12), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"},"used_scoped_memory_configs":[]}
  ROOT %custom-call.1 = (u32[131072]{0:T(1024)S(1)}, u32[1048576]{0:T(1024)S(1)}) custom-call(%all-gather.6), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.4 (param_0.15: u32[131072], param_1.9: u32[1048576]) -> (bf16[2048,2048], u32[131072]) {
  %param_0.15 = u32[131072]{0:T(1024)S(1)} parameter(0)
  %all-gather.8 = u32[1048576]{0:T(1024)S(1)} all-gather(%param_0.15), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"},"used_scoped_memory_configs":[]}
}

%fused_computation.7 (param_0.16: u32[131072], param_1.10: u32[1048576]) -> u32[1048576] {
  %param_0.16 = u32[131072]{0:T(1024)S(1)} parameter(0)
  %all-gather.10 = u32[1048576]{0:T(1024)} all-gather(%param_0.16), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"},"used_scoped_memory_configs":[]}
  ROOT %custom-call.3 = u32[1048576]{0:T(1024)S(1)} custom-call(%param_0.16, %param_1.10, %all-gather.10), custom_call_target="AsyncCollectiveDone"
}
"""  # noqa: E501

# By hand, GPU: results of a start are a tuple (operand, result) or nested deeper, and
# the pair may also stand as async-start around a computation.
GPU_PAIRS = """
HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=2

ENTRY %main (a: f32[64], b: u32[16]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %b = u32[16]{0} parameter(1)
  %ar-start = f32[64]{0} all-reduce-start(%a), channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %ar-done = f32[64]{0} all-reduce-done(%ar-start)
  %ag-start = (u32[16]{0}, u32[32]{0}) all-gather-start(%b), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %ag-done = u32[32]{0} all-gather-done(%ag-start)
  %rs-start = ((f32[64]{0}), f32[32]{0}) reduce-scatter-start(%ar-done), channel_id=3, replica_groups={{0,1}}, dimensions={0}, to_apply=%add
  %rs-done = f32[32]{0} reduce-scatter-done(%rs-start)
  ROOT %t = (f32[64]{0}, u32[32]{0}) tuple(%ar-done, %ag-done)
}
"""  # noqa: E501

GPU_WRAPPED = """
%wrapped (p.1: u32[2,8]) -> u32[2,8] {
  %p.1 = u32[2,8]{1,0} parameter(0)
  ROOT %all-to-all = u32[2,8]{1,0} all-to-all(%p.1), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}, execution_thread="parallel"

ENTRY %main (p: u32[2,8]) -> u32[2,8] {
  %p = u32[2,8]{1,0} parameter(0)
  %start = ((u32[2,8]{1,0}), u32[2,8]{1,0}) async-start(%p), async_execution_thread="parallel", calls=%wrapped
  %update = ((u32[2,8]{1,0}), u32[2,8]{1,0}) async-update(%start), async_execution_thread="parallel", calls=%wrapped
  ROOT %done = u32[2,8]{1,0} async-done(%update), async_execution_thread="parallel", calls=%wrapped
}
"""  # noqa: E501

# By hand, older versions: no percent signs, and every operand with its type.
TYPED_OPERANDS = """
  all-reduce.1 = (f32[64]{0:T(128)}, s32[]) all-reduce(f32[64]{0:T(128)} p.0, s32[] p.1), channel_id=1, replica_groups={{0,1}}, to_apply=add
"""  # noqa: E501

# By hand, after a TPU: only the first operand is data, the rest steers.
RAGGED = f"""
  %in = f32[32,128]{{1,0}} parameter(0)
  %out = f32[64,128]{{1,0}} parameter(1)
  %i = s32[8]{{0}} parameter(2)
  %r = f32[64,128]{{1,0}} ragged-all-to-all(%in, %out, %i, %i, %i, /*index=5*/%i), channel_id=1, {ALL_8}
"""  # noqa: E501

# From libtpu 0.0.42.1, v5e:2x4 with num_slices=2: the program of one slice. A psum and
# an all_to_all over both slices, and a print on the host.
TPU_SLICES = """
HloModule jit_f, is_scheduled=true, num_partitions=8
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="psum.7_0"}
  %bitcast = f32[8,8,128]{2,1,0:T(8,128)} bitcast(%param.1)
  %send = (f32[8,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"flag_configs":[],"aggregated_send_recv_config":{"status":"AGGREGATE_STATUS_DEFER"}}
  %recv = (f32[8,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"flag_configs":[],"aggregated_send_recv_config":{"status":"AGGREGATE_STATUS_ISSUE"}}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv-done = (f32[8,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %all_to_all.8 = u32[2,4,1024]{2,1,0:T(4,128)} bitcast(%param.2)
  %send.1 = (u32[2,4,1024]{2,1,0:T(4,128)}, u32[], token[]) send(%all_to_all.8, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all_to_all.9_0",_xla_megascale_target={{100000,200000},{100001,200001},{100002,200002},{100003,200003},{100004,200004},{100005,200005},{100006,200006},{100007,200007}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %recv.1 = (u32[2,4,1024]{2,1,0:T(4,128)}, u32[], token[]) recv(%after-all), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all_to_all.9_0",_xla_megascale_target={{100000,200000},{100001,200001},{100002,200002},{100003,200003},{100004,200004},{100005,200005},{100006,200006},{100007,200007}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %reduce_sum.9 = f32[]{:T(128)S(6)} reduce(%param.1, %constant)
  %debug_print.20 = (f32[], u32[], token[]) send(%reduce_sum.9, %debug_print.19), channel_id=5, is_host_transfer=true, sharding={{manual}, {manual}, {manual}}, frontend_attributes={_xla_host_transfer_handler_name="pjrt_rendezvous",_xla_host_transfer_rendezvous="2"}
  %debug_print.22 = (f32[], u32[], token[]) recv(%debug_print.21), channel_id=6, is_host_transfer=true, sharding={{manual}, {manual}, {manual}}, frontend_attributes={_xla_host_transfer_handler_name="pjrt_rendezvous",_xla_host_transfer_rendezvous="3"}
  %custom-call = u32[] custom-call(), custom_call_target="SliceId"
"""  # noqa: E501

# By hand, GPU: a collective-permute cut into a send and a recv, in order to overlap.
GPU_CUT = """
  %x = f32[16]{0} parameter(0)
  %after-all = token[] after-all()
  %recv = (f32[16]{0}, u32[], token[]) recv(%after-all), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}, control-predecessors={%x}
  %send = (f32[16]{0}, u32[], token[]) send(%x, %after-all), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}
  %recv-done = (f32[16]{0}, token[]) recv-done(%recv), channel_id=1
  %send-done = token[] send-done(%send), channel_id=1
"""  # noqa: E501

TEXTS = {  # text: (operation, element types, shapes, group, operand bytes, link bytes)
    "cpu tuple": (
        CPU_TUPLE,
        [("all-to-all", ("u32",) * 4, ((1, 512),) * 4, 4, 8192, 6144)],
    ),
    "cpu mesh groups": (
        CPU_MESH,
        [
            (
                "all-reduce",
                ("f32",) * 8,
                tuple((4, n) for n in range(10, 18)),
                4,
                1728,
                2592,
            )
        ],
    ),
    "tpu all-to-all": (
        TPU_ALL_TO_ALL,
        [("all-to-all", ("u32",), ((8, 1, 65536),), 8, 2097152, 1835008)],
    ),
    "tpu permute": (
        TPU_PERMUTE,
        [("collective-permute", ("f32",), ((8, 128),), 8, 4096, 4096)],
    ),
    "tpu narrow types": (
        TPU_NARROW,
        [
            ("all-reduce", ("bf16",), ((1000,),), 8, 2000, 3500),
            ("all-gather", ("s4",), ((4096,),), 8, 2048, 7 * 2048),
        ],
    ),
    "tpu padded all-reduce": (
        TPU_PADDED,
        [("all-reduce", ("u32",), ((262144,),), 64, 1048576, 2064384)],
    ),
    "tpu fused over three steps": (
        TPU_FUSED,
        [("all-gather", ("u32",), ((131072,),), 8, 524288, 3670016)],
    ),
    "gpu start and done": (
        GPU_PAIRS,
        [
            ("all-reduce", ("f32",), ((64,),), 2, 256, 256),
            ("all-gather", ("u32",), ((16,),), 2, 64, 64),
            ("reduce-scatter", ("f32",), ((64,),), 2, 256, 128),
        ],
    ),
    "gpu async-start": (GPU_WRAPPED, [("all-to-all", ("u32",), ((2, 8),), 2, 64, 32)]),
    "typed operands": (
        TYPED_OPERANDS,
        [("all-reduce", ("f32", "s32"), ((64,), ()), 2, 260, 260)],
    ),
    "tpu slices": (
        TPU_SLICES,
        [
            ("all-reduce", ("f32",), ((8, 8, 128),), 2, 32768, 32768),
            ("all-to-all", ("u32",), ((2, 4, 1024),), 2, 32768, 16384),
        ],
    ),
    "gpu send and recv": (
        GPU_CUT,
        [("collective-permute", ("f32",), ((16,),), 4, 64, 64)],
    ),
    "ragged": (
        RAGGED,
        [("ragged-all-to-all", ("f32",), ((32, 128),), 8, 16384, 14336)],
    ),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_read_hlo_reads_the_text_of(text, expected):
    assert [
        (
            c.operation,
            c.element_types,
            c.shapes,
            c.group_size,
            c.operand_bytes,
            c.link_bytes,
        )
        for c in wire.read_hlo(text)
    ] == expected
    assert all((c.loop, c.executions) == (False, 1) for c in wire.read_hlo(text))


def collective(operation, attributes, operand="f32[10]{0}"):
    return f"%x = {operand} parameter(0)\n%y = f32[] {operation}(%x), {attributes}"


@pytest.mark.parametrize(
    ("operation", "link_bytes"),
    [
        ("all-reduce", 64),  # 2 * 4/5 * 40
        ("reduce-scatter", 32),  # 4/5 * 40
        ("all-gather", 160),  # 4 * 40
        ("all-to-all", 32),
        ("ragged-all-to-all", 32),
        ("collective-broadcast", 40),
    ],
)
def test_link_bytes_follow_the_algorithm(operation, link_bytes):
    text = collective(operation, "replica_groups={{0,1,2,3,4}}")
    (c,) = wire.read_hlo(text)
    assert (c.operation, c.operand_bytes, c.link_bytes) == (operation, 40, link_bytes)
    (alone,) = wire.read_hlo(collective(operation, "replica_groups={{0},{1}}"))
    assert (alone.group_size, alone.operand_bytes, alone.link_bytes) == (1, 40, 0)
    (started,) = wire.read_hlo(text.replace(operation, f"{operation}-start"))
    assert dataclasses.replace(started, name="") == dataclasses.replace(c, name="")
    assert wire.read_hlo(text.replace(operation, f"{operation}-done")) == ()


def test_link_bytes_are_rounded_up():
    (c,) = wire.read_hlo(collective("all-reduce", "replica_groups={{0,1,2}}"))
    assert c.link_bytes == 54  # 2 * 2/3 * 40 = 53.3


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={{0, 1, 2}, {3, 4, 5}}", 3),
        ("replica_groups={}", 16),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=[1,16]<=[16]", 16),
        ("replica_groups=mesh['data'=8] {'data'}", 8),
        ("replica_groups=mesh['x'=2,'y'=3,'z'=5] {'z','x'}", 10),
        ("replica_groups=mesh['r'=8,'one'=1] {'one'}", 1),
        ("replica_groups=mesh['data'=8] {'data':(2)4}", 4),
        ("replica_groups=mesh['a b'=8,'c'=2] {'a b':(1)2,'c'}", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", 2),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 3),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 2),
        ("source_target_pairs={{0,1},{2,3},{1,2}}", 4),
        ("source_target_pairs={{0,0},{1,1}}", 1),
        ("source_target_pairs={}", 1),
    ],
)
def test_group_size(groups, size):
    operation = "collective-permute" if "pairs" in groups else "all-gather"
    attributes = f"channel_id=1, {groups}, use_global_device_ids=true"
    (c,) = wire.read_hlo(collective(operation, attributes), num_partitions=16)
    assert c.group_size == size
    assert (c.link_bytes == 0) == (size == 1)


def chunks(order, size):
    return tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))


PAIRED = ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", PAIRED),
        ("replica_groups={{0, 2}, {1, 3}, {4, 6}, {5, 7}}", PAIRED),
        ("replica_groups={{0,1,2},{5}}", ((0, 1, 2), (5,))),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8]", chunks(range(8), 4)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", PAIRED),
        # a part of each row of a mesh, in the order of the axes named
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", PAIRED),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", chunks(range(8), 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", PAIRED),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", chunks(range(8), 2)),
        (
            "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2,'b':(1)2}",
            ((0, 2, 1, 3), (4, 6, 5, 7)),
        ),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        (
            "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}",
            ((0, 4, 1, 5), (2, 6, 3, 7)),
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}",
            ((0, 2), (1, 3)),
        ),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ((0, 4), (1, 5))),
        ("source_target_pairs={{3,1},{1,0},{2,2}}", ((0, 1, 3), (2,))),
        ("source_target_pairs={}", ()),
    ],
)
def test_groups_become_positions_of_devices(groups, expected):
    operation = "collective-permute" if "pairs" in groups else "all-gather"
    attributes = f"channel_id=1, {groups}, dimensions={{0}}, use_global_device_ids=true"
    (c,) = wire.read_hlo(collective(operation, attributes), num_partitions=8)
    assert c.groups == expected
    assert c.group_size == max(map(len, expected), default=1)


@pytest.mark.parametrize(
    ("operation", "attributes", "expected"),
    [  # two replicas of four partitions, at positions 4 r + p
        (
            "all-reduce",
            "replica_groups={{0,1}}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        (
            "all-reduce",
            "channel_id=1, replica_groups={{0},{1}}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        (
            "all-reduce",
            "channel_id=1, replica_groups={{0,1}}",
            ((0, 1, 2, 3, 4, 5, 6, 7),),
        ),
        (
            "all-to-all",
            "channel_id=1, replica_groups={{0,1},{2,3}}",
            ((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        (
            "collective-permute",
            "channel_id=1, source_target_pairs={{0,3}}",
            ((0, 3), (4, 7)),
        ),
        (
            "all-reduce",
            "channel_id=1, replica_groups={{0,5}}, use_global_device_ids=true",
            ((0, 5),),
        ),
        ("all-reduce", "replica_groups={}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ],
)
def test_groups_of_replicas_and_partitions(operation, attributes, expected):
    text = "HloModule m, replica_count=2, num_partitions=4\n"
    (c,) = wire.read_hlo(text + collective(operation, attributes))
    assert c.groups == expected


def test_a_channel_of_the_one_replica_joins_all_partitions():
    text = "HloModule m, num_partitions=4\n"
    one = "replica_groups={{0}}"
    (c,) = wire.read_hlo(text + collective("all-reduce", f"channel_id=1, {one}"))
    assert c.groups == ((0, 1, 2, 3),)
    (alone,) = wire.read_hlo(text + collective("all-reduce", one))
    assert alone.group_size == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ('"{1,2}x{0:2}"', ((100000, 200000), (100001, 200001), (100002, 200002))),
        ('"{3,1}x{0,4:5}"', ((300000, 100000), (300004, 100004), (300005, 100005))),
        ("{{100000,200005},{100001,200000}}", ((100000, 200005), (100001, 200000))),
        ("{{100007->200000},{200007->100000}}", ((100007, 200000), (100000, 200007))),
    ],
)
def test_what_crosses_slices_names_devices_by_their_ids(target, expected):
    text = TPU_SLICES.replace('"{1,2}x{0:7}"', target)
    first, second = wire.read_hlo(text)
    assert first.between_slices and second.between_slices
    assert first.groups == expected
    assert second.groups[1] == (100001, 200001)


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("ALL_REDUCE", "all-reduce"),
        ("ALL_GATHER", "all-gather"),
        ("ALL_TO_ALL", "all-to-all"),
        ("REDUCE_SCATTER", "reduce-scatter"),
        ("ONE_TO_ONE", "collective-permute"),
    ],
)
def test_what_crosses_slices_is_a_collective(kind, operation):
    text = TPU_SLICES.replace("ALL_REDUCE", kind)
    assert wire.read_hlo(text)[0].operation == operation


def test_num_partitions_wins_over_the_first_line():
    text = "HloModule m, replica_count=2, num_partitions=4\n" + collective(
        "all-gather", "replica_groups={}"
    )
    assert wire.read_hlo(text)[0].group_size == 8
    assert wire.read_hlo(text, num_partitions=3)[0].group_size == 3
    alone = text.replace(", replica_count=2, num_partitions=4", "")
    assert wire.read_hlo(alone)[0].group_size == 1


@pytest.mark.parametrize(
    ("element", "nbytes"),
    [
        ("pred[3,5]{1,0}", 15),
        ("s8[]", 1),
        ("bf16[7]{0}", 14),
        ("f8e4m3fn[6]{0}", 6),
        ("c64[2]{0}", 16),
        ("f64[0,4]{1,0}", 0),
        ("s4[5]{0}", 5),  # a byte each, unless the layout packs
        ("u2[5]{0:E(2)}", 2),
        ("f32[<=8]{0}", 32),
    ],
)
def test_operand_bytes_of_type(element, nbytes):
    (c,) = wire.read_hlo(collective("all-gather", ALL_8, operand=element))
    assert c.operand_bytes == nbytes
    assert c.element_types == (element.partition("[")[0],)


def test_collectives_are_found_by_their_opcode_alone():
    text = (
        '%all-gather.1 = f32[8]{0} add(%a, %b), metadata={op_name="all-gather(x)"}\n'
        "%all-reduce-scatter = f32[8]{0} fusion(%all-gather.1), calls=%all-reduce\n"
        "%all-to-all-done = f32[8]{0} all-to-all-done(%all-to-all-start)"
    )
    assert wire.read_hlo(text) == ()


# ------------------------------------------------- nothing that moves is passed over

TOKEN, OPERAND, SLICE_SEND, SLICE_RECV = TPU_SLICES.splitlines()[2:6]
# From libtpu 0.0.42.1, v5e:2x4, without its body: a Pallas kernel that writes into its
# neighbour's memory, on three lines.
KERNEL = """
  %shard_map.12 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%param.1), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}, frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"x\\"]"
}}, metadata={op_name="jit(wrapped)/shard_map/pallas_call" stack_frame_id=1}, backend_config={"flag_configs":[],"custom_call_config":{"body":"","has_communication":true,"needs_layout_passes":true}}
"""  # noqa: E501
UNREAD = {
    "infeed": ("%y = (f32[8], token[]) infeed(%t)", "the infeed `y`"),
    "outfeed": ("%y = token[] outfeed(%x, %t)", "the outfeed `y`"),
    "send to who knows": (
        "%y = (f32[8], u32[], token[]) send(%x, %t), channel_id=1",
        "the send `y`",
    ),
    "send by another way": (
        SLICE_SEND.replace("xla_megascale_runtime", "tf_rendezvous"),
        "the send `send`",
    ),
    "send of another kind": (
        SLICE_SEND.replace("ALL_REDUCE", "ALL_SHUFFLE"),
        "the send `send`",
    ),
    "recv alone": (SLICE_RECV, "the recv without its send `recv`"),
    "recv of another send": (
        f"{TOKEN}\n{OPERAND}\n{SLICE_SEND}\n"
        + SLICE_RECV.replace("psum.7_0", "psum.8_0"),
        "the recv without its send `recv`",
    ),
    "a library's call": (
        '%y = f32[8] custom-call(%x), custom_call_target="ncclAllReduce"',
        "the custom-call ncclAllReduce `y`",
    ),
    "another's call": (
        '%y = f32[8] custom-call(%x), custom_call_target="mpi_allreduce_ffi"',
        "the custom-call mpi_allreduce_ffi `y`",
    ),
    "a call with groups": (
        '%y = f32[8] custom-call(%x), custom_call_target="mine", '
        "replica_groups={{0,1}}",
        "the custom-call `y`",
    ),
    "a kernel": (KERNEL, "the custom-call tpu_custom_call `shard_map.12`"),
    "an unknown collective": (
        "%y = f32[8] all-shuffle-start(%x), mode=fast",
        "the all-shuffle-start `y`",
    ),
    "an unknown operation with a channel": (
        "%y = f32[8] mystery(%x), channel_id=7",
        "the mystery `y`",
    ),
    "one inside an async-start": (
        "%wrapped (p: f32[8]) -> f32[8] {\n"
        "  ROOT %y = f32[8] mystery(%p), replica_groups={{0,1}}\n"
        "}\n"
        "%s = ((f32[8]), f32[8]) async-start(%x), calls=%wrapped",
        "the mystery `y`",
    ),
}


@pytest.mark.parametrize(("text", "says"), UNREAD.values(), ids=UNREAD)
def test_what_moves_data_in_an_unknown_way_raises(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        wire.read_hlo(text)
    assert "does not know how many bytes" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        KERNEL.replace('"has_communication":true,', ""),
        '%y = u32[] custom-call(), custom_call_target="SliceId"',
        '%y = f32[8] custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        '%y = s32[8] custom-call(%x), custom_call_target="lu_pivots_to_permutation"',
        '%y = f32[8] add(%x, %x), metadata={op_name="channel_id=1 replica_groups="}',
        "%y = (f32[8], f32[8], u32[]) copy-start(%x)",
        "%y = u32[] partition-id()",
    ],
)
def test_what_stays_on_its_device_is_passed_over(text):
    assert wire.read_hlo(text) == ()


# ------------------------------------------------------------------------- loops

LOOP = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
}

%inner_body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %inner = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%outer_body (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %outer = f32[4]{0} all-gather(%q), replica_groups={{0,1}}
  %while.2 = f32[4]{0} while(%q), condition=%never, body=%inner_body, INNER
}

%outer_condition (r: f32[4]) -> pred[] {
  %r = f32[4]{0} parameter(0)
  %test = f32[4]{0} all-to-all(%r), replica_groups={{0,1}}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %once = f32[4]{0} collective-broadcast(%a), replica_groups={{0,1}}
  ROOT %while.1 = f32[4]{0} while(%a), condition=%outer_condition, body=%outer_body, OUTER
}
"""  # noqa: E501
KNOWN = 'backend_config={{"dynamic_variables":[],"known_trip_count":{{"n":"{}"}}}}'
ESCAPED = 'backend_config="{{\\"known_trip_count\\":{{\\"n\\":\\"{}\\"}}}}"'  # older
UNKNOWN = "backend_config={{}}"


@pytest.mark.parametrize(
    ("outer", "inner", "executions"),
    [
        (KNOWN, KNOWN, {"once": 1, "outer": 5, "test": 6, "inner": 15}),
        (ESCAPED, KNOWN, {"once": 1, "outer": 5, "test": 6, "inner": 15}),
        (UNKNOWN, KNOWN, {"once": 1, "outer": None, "test": None, "inner": None}),
        (KNOWN, UNKNOWN, {"once": 1, "outer": 5, "test": 6, "inner": None}),
    ],
    ids=["known", "known, escaped", "outer unknown", "inner unknown"],
)
def test_loop_multiplies_by_its_trip_count(outer, inner, executions):
    text = LOOP.replace("OUTER", outer.format(5)).replace("INNER", inner.format(3))
    found = {c.name: c for c in wire.read_hlo(text)}
    assert {name: c.executions for name, c in found.items()} == executions
    for name, c in found.items():
        assert c.loop == (name != "once")
        assert c.operand_bytes == 16 * (executions[name] or 1)
        # of its 16 bytes, for two workers, only the all-to-all keeps a half
        once = {"once": 16, "outer": 16, "test": 8, "inner": 16}[name]
        assert c.link_bytes == once * (executions[name] or 1)


# From libtpu 0.0.42.1, without layouts: a scan, whose trip count is not stated.
COUNTED = """
%body (wide.param.2: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %constant.1 = s32[] constant(1)
  %wide.param.2 = (s32[], f32[8], s32[]) parameter(0)
  %get-tuple-element.39 = f32[8] get-tuple-element(%wide.param.2), index=1
  %sum = f32[8] all-reduce(%get-tuple-element.39), replica_groups={{0,1}}, to_apply=%add
  %get-tuple-element.38 = s32[] get-tuple-element(%wide.param.2), index=0
  %add.6 = s32[] add(%get-tuple-element.38, %constant.1)
  %get-tuple-element.43 = s32[] get-tuple-element(%wide.param.2), index=2
  ROOT %tuple.17 = (s32[], f32[8], s32[]) tuple(%add.6, %sum, %get-tuple-element.43)
}

%condition (wide.param.1: (s32[], f32[8], s32[])) -> pred[] {
  %constant.5 = s32[] constant(5)
  %wide.param.1 = (s32[], f32[8], s32[]) parameter(0)
  %limit = s32[] get-tuple-element(%wide.param.1), index=2
  %get-tuple-element.22 = s32[] get-tuple-element(%wide.param.1), index=0
  ROOT %lt.3 = pred[] compare(%get-tuple-element.22, %constant.5), direction=LT
}

ENTRY %main.5_spmd (param.3: f32[8]) -> f32[8] {
  %constant.8 = s32[] constant(0)
  %constant.9 = s32[] constant(9)
  %param.3 = f32[8] parameter(0)
  %copy.11 = s32[] copy(%constant.8)
  %tuple.15 = (s32[], f32[8], s32[]) tuple(%copy.11, %param.3, %constant.9)
  %while.10 = (s32[], f32[8], s32[]) while(%tuple.15), condition=%condition, body=%body
  ROOT %get-tuple-element.14 = f32[8] get-tuple-element(%while.10), index=1
}
"""
LIMIT = "get-tuple-element.22, %constant.5)"
CARRIED = "get-tuple-element.22, %limit)"
KEPT_ALONG = "tuple(%add.6, %sum, %get-tuple-element.43)"


@pytest.mark.parametrize(
    ("changes", "executions"),
    [
        ({}, 5),
        ({"constant(0)": "constant(2)"}, 3),
        ({"constant(0)": "constant(-2)"}, 7),
        ({"constant(0)": "constant(6)"}, 0),
        ({"constant(1)": "constant(3)"}, 2),  # at 0 and 3
        ({"%get-tuple-element.38, %constant.1": "%constant.1, %copy.9"}, None),
        (
            {"(%get-tuple-element.22, %constant.5)": "(%get-tuple-element.22, %limit)"},
            9,
        ),
        ({LIMIT: CARRIED, KEPT_ALONG: "tuple(%add.6, %sum, %add.6)"}, None),
        ({"direction=LT": "direction=LE"}, None),
        ({"constant(1)": "constant(0)"}, None),
        ({"constant(1)": "constant(-1)"}, None),
        ({"add(": "multiply("}, None),
        ({"constant(5)": "parameter(1)"}, None),
        ({"%copy.11 = s32[] copy": "%copy.11 = s32[] negate"}, None),
        ({"%get-tuple-element.22 = s32[] get-tuple-element": "%x = s32[] add"}, None),
    ],
)
def test_a_loop_without_a_trip_count_shows_its_counter(changes, executions):
    text = COUNTED
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (c,) = wire.read_hlo(text)
    assert (c.loop, c.executions) == (True, executions)
    assert c.operand_bytes == 32 * (1 if executions is None else executions)


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%yes, %no}", "true_computation=%yes, false_computation=%no"],
    ids=["indexed", "boolean"],
)
def test_branches_are_counted_once_each_and_marked(branches):
    text = f"""
%yes (a: f32[4]) -> f32[4] {{
  {collective("all-gather", ALL_8, "f32[4]{0}").replace(chr(10), chr(10) + "  ")}
}}
%no (a: f32[4]) -> f32[4] {{
  {collective("all-reduce", ALL_8, "f32[4]{0}").replace(chr(10), chr(10) + "  ")}
}}
ENTRY %main (a: f32[4]) -> f32[4] {{
  ROOT %c = f32[4]{{0}} conditional(%i, %a, %a), {branches}
}}
"""
    found = wire.read_hlo(text)
    assert [(c.operation, c.loop, c.executions) for c in found] == [
        ("all-gather", True, None),
        ("all-reduce", True, None),
    ]
    assert [c.operand_bytes for c in found] == [16, 16]


def test_a_computation_called_twice_runs_twice():
    text = f"""
%shared (a: f32[10]) -> f32[10] {{
  {collective("all-gather", ALL_8)}
}}
ENTRY %main (a: f32[10]) -> f32[10] {{
  %one = f32[10]{{0}} call(%a), to_apply=%shared
  ROOT %two = f32[10]{{0}} fusion(%one), kind=kCustom, calls=%shared
}}
"""
    (c,) = wire.read_hlo(text)
    assert (c.executions, c.loop, c.operand_bytes) == (2, False, 80)


def test_a_fusion_inside_a_loop_runs_with_the_loop():
    text = f"""
%fused (a: f32[10]) -> f32[10] {{
  {collective("all-gather", ALL_8)}
}}
%body (a: f32[10]) -> f32[10] {{
  ROOT %f = f32[10]{{0}} fusion(%a), kind=kCustom, calls=%fused
}}
ENTRY %main (a: f32[10]) -> f32[10] {{
  ROOT %w = f32[10]{{0}} while(%a), condition=%c, body=%body, {KNOWN.format(3)}
}}
"""
    (c,) = wire.read_hlo(text)
    assert (c.executions, c.loop, c.operand_bytes) == (3, True, 120)


# ------------------------------------------------------------------------ errors


UNDEFINED = f"""
{collective("all-gather", ALL_8)}
%z = f32[8]{{0}} all-reduce(%x, %gone), {ALL_8}
"""
ERRORS: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "not callable": (
        wire.measure,
        (3,),
        TypeError,
        "must be given a function, got int",
    ),
    "bytes": (wire.read_hlo, (b"x",), TypeError, "must be a string, got bytes"),
    "empty": (wire.read_hlo, ("",), ValueError, "without any HLO instruction"),
    "StableHLO": (
        wire.read_hlo,
        ('%0 = "stablehlo.all_reduce"(%a) : tensor<8xf32>',),
        ValueError,
        "not `.lower(...).as_text()`",
    ),
    "everybody, of unknown number": (
        wire.read_hlo,
        (collective("all-reduce", "replica_groups={}"),),
        ValueError,
        "pass `num_partitions=...`",
    ),
    "unknown groups": (
        wire.read_hlo,
        (collective("all-reduce", "replica_groups=new<8>"), 8),
        ValueError,
        "cannot tell the group size of `y`, got `, replica_groups=new<8>`",
    ),
    "no groups": (
        wire.read_hlo,
        (collective("all-reduce", "channel_id=1"), 8),
        ValueError,
        "cannot tell the group size of `y`",
    ),
    "undefined operand": (
        wire.read_hlo,
        (UNDEFINED,),
        ValueError,
        "cannot find the operands of `z`, got `%x, %gone`",
    ),
    "broken line": (
        wire.read_hlo,
        (f"%y = (f32[8], f32[64]) all-gather-start(\n  %x), {ALL_8}",),
        ValueError,
        "cannot find the operands of `y`, got ``; pass the whole text",
    ),
    "num_partitions 0": (
        wire.read_hlo,
        (GPU_PAIRS, 0),
        ValueError,
        "`read_hlo(num_partitions=...)` must be a positive int, got 0",
    ),
    "num_partitions bool": (
        wire.read_hlo,
        (GPU_PAIRS, True),
        ValueError,
        "must be a positive int, got True",
    ),
}


@pytest.mark.parametrize(
    ("function", "args", "error", "message"), ERRORS.values(), ids=ERRORS
)
def test_errors_say_what_is_wrong(function, args, error, message):
    with pytest.raises(error, match=re.escape(message)):
        function(*args)


class NoText:
    """A step of a backend that prints nothing."""

    def __call__(self): ...

    def lower(self):
        return self

    def compile(self):
        return self

    def as_text(self):
        return None


def test_measure_refuses_a_backend_without_text():
    with pytest.raises(ValueError, match="this backend gives none"):
        wire.measure(NoText())


# ----------------------------------------------------------------- real compiles

X = jax.ShapeDtypeStruct((64, 128), jnp.uint32)  # 4096 bytes on each of 8 workers
DATA = P("data")
RING = [(i, (i + 1) % 8) for i in range(8)]


def sharded(body, mesh, out_specs=DATA, in_specs=DATA):
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def place(x, mesh, spec=DATA):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    ("body", "out_specs", "expected"),
    [
        (lambda x: jax.lax.psum(x, "data"), P(), ("all-reduce", 4096, 7168)),
        (
            lambda x: jax.lax.all_gather(x, "data", to="invarying"),
            P(),
            ("all-gather", 4096, 28672),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 0),
            DATA,
            ("all-to-all", 4096, 3584),
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
            DATA,
            ("reduce-scatter", 4096, 3584),
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", RING),
            DATA,
            ("collective-permute", 4096, 4096),
        ),
    ],
    ids=["psum", "all_gather", "all_to_all", "psum_scatter", "ppermute"],
)
def test_measure_reads_the_compiled_step(mesh, body, out_specs, expected):
    report = wire.measure(sharded(body, mesh, out_specs), place(X, mesh))
    (c,) = report.collectives
    assert (c.operation, c.operand_bytes, c.link_bytes) == expected
    assert set(c.element_types) == {"u32"}
    assert (c.group_size, c.loop, c.executions) == (8, False, 1)
    assert (report.operand_bytes, report.bytes_sent_per_worker) == expected[1:]


@pytest.mark.parametrize(
    ("axes", "operand_bytes", "group_size"),
    [("data", 4096, 4), ("model", 4096, 2), (("data", "model"), 4096, 8)],
)
def test_measure_knows_the_groups_of_a_mesh_of_two_axes(
    mesh, axes, operand_bytes, group_size
):
    grid = Mesh(
        mesh.devices.reshape(2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2
    )
    spec = P(("model", "data"))
    fn = jax.shard_map(
        lambda x: jax.lax.all_gather(x, axes),
        mesh=grid,
        in_specs=spec,
        out_specs=spec,
    )
    report = wire.measure(fn, place(X, grid, spec))
    (c,) = report.collectives
    assert (c.operation, c.group_size) == ("all-gather", group_size)
    assert report.operand_bytes == operand_bytes
    assert report.bytes_sent_per_worker == operand_bytes * (group_size - 1)


def test_the_reduction_of_a_tree_is_one_collective(mesh):
    tree = {f"leaf{i}": jax.ShapeDtypeStruct((8, 10 + i), "float32") for i in range(20)}
    tree = jax.tree.map(lambda x: place(x, mesh), tree)
    fn = sharded(lambda t: jax.lax.psum(t, "data"), mesh, P())
    (c,) = wire.measure(fn, tree).collectives
    assert c.operand_bytes == sum(4 * (10 + i) for i in range(20))
    assert sorted(c.shapes) == [(1, 10 + i) for i in range(20)]


@pytest.mark.parametrize("length", [1, 5])
def test_measure_counts_the_trips_of_a_scan(mesh, length):
    def body(x):
        def step(carry, _):
            mean = jax.lax.pmean(carry, "data") * jnp.float32(0.5)
            return jax.lax.pcast(mean, "data", to="varying"), None

        return jax.lax.scan(step, x, None, length=length)[0]

    x = place(jax.ShapeDtypeStruct((8, 16), "float32"), mesh)
    report = wire.measure(sharded(body, mesh), x)
    assert report.operand_bytes == length * 64
    assert report.bytes_sent_per_worker == length * 112
    assert {c.executions for c in report.collectives} == {length}


def test_measure_marks_a_loop_of_unknown_length(mesh):
    def body(x):
        return jax.lax.while_loop(
            lambda x: jax.lax.pmean(x, "data").sum() > 1, lambda x: x * 0.5, x
        )

    x = place(jax.ShapeDtypeStruct((8, 16), "float32"), mesh)
    (c,) = wire.measure(sharded(body, mesh), x).collectives
    assert (c.loop, c.executions, c.operand_bytes) == (True, None, 64)


def test_measure_takes_any_kind_of_step(mesh):
    fn = sharded(lambda x: jax.lax.psum(x, "data"), mesh, P())
    x = jax.device_put(jnp.ones((64, 4)), NamedSharding(mesh, DATA))
    mapped = jax.pmap(lambda x: jax.lax.psum(x, "data"), axis_name="data")
    donating = jax.jit(fn, donate_argnums=0)
    steps = {
        "plain": wire.measure(fn, x),
        "jit": wire.measure(jax.jit(fn), place(x, mesh)),
        "donating": wire.measure(donating, x),
        "keyword": wire.measure(jax.jit(lambda *, fn_: fn(fn_)), fn_=x),
        "pmap": wire.measure(mapped, jnp.ones((8, 8, 4))),
    }
    assert {k: r.operand_bytes for k, r in steps.items()} == dict.fromkeys(steps, 128)
    assert float(x.sum()) == 256  # not donated: nothing has run


def test_simulated_workers_send_nothing():
    fn = jax.vmap(lambda x: jax.lax.psum(x, "data"), axis_name="data")
    report = wire.measure(fn, jnp.ones((8, 4)))
    assert report == wire.WireReport(())
    assert (report.operand_bytes, report.bytes_sent_per_worker) == (0, 0)


# -------------------------------------------------------------------------- room


def test_what_reads_programs_needs_nothing_of_efopt_but_tables():
    for file in Path(efopt.__file__).parent.joinpath("hlo").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "efopt"
            ):
                assert node.module == "efopt.ground.tables" or (
                    node.module or ""
                ).startswith("efopt.hlo"), file


# ------------------------------------------------------------------------ report


def test_report_prints_a_table():
    texts = [
        collective("all-gather", ALL_8, "u32[1,4096]{1,0}"),
        collective("all-gather", ALL_8, "u32[1,4096]{1,0}").replace("%y", "%z"),
        *(text for text, _ in (TEXTS["cpu tuple"], TEXTS["cpu mesh groups"])),
        LOOP.replace("OUTER", KNOWN.format(5)).replace("INNER", UNKNOWN.format()),
    ]
    report = wire.WireReport(sum(map(wire.read_hlo, texts), ()))
    assert str(report).splitlines() == [
        "operation             type  shape            count  group  operand bytes  link bytes",  # noqa: E501
        "all-gather            u32   [1,4096]             2      8         32,768     229,376",  # noqa: E501
        "all-to-all            u32   4 x [1,512]          1      4          8,192       6,144",  # noqa: E501
        "all-reduce            f32   [4,10] + 7 more      1      4          1,728       2,592",  # noqa: E501
        "all-reduce            f32   [4]                 1*      2             16          16",  # noqa: E501
        "all-gather            f32   [4]                  5      2             80          80",  # noqa: E501
        "all-to-all            f32   [4]                  6      2             96          48",  # noqa: E501
        "collective-broadcast  f32   [4]                  1      2             16          16",  # noqa: E501
        "total                                                             42,896     238,272",  # noqa: E501
        "* in a loop or branch, run unknown times: counted once",
    ]


def test_report_marks_what_crosses_slices():
    lines = str(wire.WireReport(wire.read_hlo(TPU_SLICES))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["all-reduce^", "all-to-all^"]
    assert lines[-1] == "^ between slices, sent and received by their hosts"


def test_report_without_collectives_says_so_in_words():
    assert str(wire.WireReport(())).startswith("no collectives")


@pytest.mark.parametrize(
    "value", [wire.WireReport(()), wire.read_hlo(TYPED_OPERANDS)[0]], ids=type
)
def test_results_are_frozen_and_hashable(value):
    assert hash(value) == hash(dataclasses.replace(value))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        setattr(value, dataclasses.fields(value)[0].name, None)
