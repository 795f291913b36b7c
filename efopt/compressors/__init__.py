"""Compressors: how an array becomes a payload and back; one operator a file."""

from efopt.codecs.compressor import Compressor as Compressor
from efopt.codecs.compressor import RoundTripState as RoundTripState
from efopt.compressors.arc_top_k import arc_top_k as arc_top_k
from efopt.compressors.cast import cast as cast
from efopt.compressors.compose import compose as compose
from efopt.compressors.count_sketch import count_sketch as count_sketch
from efopt.compressors.dct_top_k import dct_top_k as dct_top_k
from efopt.compressors.identity import identity as identity
from efopt.compressors.natural import natural as natural
from efopt.compressors.partition import partition as partition
from efopt.compressors.power_sgd import power_sgd as power_sgd
from efopt.compressors.qsgd import qsgd as qsgd
from efopt.compressors.quantize import quantize as quantize
from efopt.compressors.random_block import random_block as random_block
from efopt.compressors.random_k import random_k as random_k
from efopt.compressors.scaled_sign import scaled_sign as scaled_sign
from efopt.compressors.sign import sign as sign
from efopt.compressors.terngrad import terngrad as terngrad
from efopt.compressors.threshold import threshold as threshold
from efopt.compressors.top_k import top_k as top_k
from efopt.compressors.two_magnitudes import two_magnitudes as two_magnitudes
