"""Compressors: how one array becomes a payload and back. One family a file."""

from efopt.compressors.compressor import Compressor as Compressor
from efopt.compressors.compressor import CompressorState as CompressorState
from efopt.compressors.identity import identity as identity
from efopt.compressors.sign import scaled_sign as scaled_sign
from efopt.compressors.sign import sign as sign
from efopt.compressors.sparse import random_k as random_k
from efopt.compressors.sparse import top_k as top_k
