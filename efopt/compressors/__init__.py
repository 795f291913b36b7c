"""Compressors: how one array becomes a payload and back. One family a file."""

from efopt.codecs.compressor import Compressor as Compressor
from efopt.codecs.compressor import RoundTripState as RoundTripState
from efopt.compressors.compose import compose as compose
from efopt.compressors.count_sketch import count_sketch as count_sketch
from efopt.compressors.floating import cast as cast
from efopt.compressors.floating import natural as natural
from efopt.compressors.identity import identity as identity
from efopt.compressors.partition import partition as partition
from efopt.compressors.power_sgd import power_sgd as power_sgd
from efopt.compressors.quantize import qsgd as qsgd
from efopt.compressors.quantize import quantize as quantize
from efopt.compressors.quantize import terngrad as terngrad
from efopt.compressors.sign import scaled_sign as scaled_sign
from efopt.compressors.sign import sign as sign
from efopt.compressors.sparse import random_block as random_block
from efopt.compressors.sparse import random_k as random_k
from efopt.compressors.sparse import threshold as threshold
from efopt.compressors.sparse import top_k as top_k
