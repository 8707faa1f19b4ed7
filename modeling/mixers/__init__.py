"""Token mixers, one file each, behind one base class. Importing this package registers them all."""

from riverrun.modeling.mixer_options import OPTIONS
from riverrun.modeling.mixers.attention import Attention
from riverrun.modeling.mixers.base import MIXERS, Mixer, States, register
from riverrun.modeling.mixers.gated_delta import GatedDelta
from riverrun.modeling.mixers.head_rnn import GRU, LSTM, SLSTM, Elman
from riverrun.modeling.mixers.mamba2 import Mamba2
from riverrun.modeling.mixers.neural_memory import Atlas, DeepTransformer, Memora, Moneta, OmegaNet, TitansLMM, Yaad
from riverrun.modeling.mixers.para import ParaGRU, ParaLSTM
from riverrun.modeling.mixers.prefix_linear_attention import PrefixLinearAttention
from riverrun.modeling.mixers.titans import TitansMAG, TitansMAL
from riverrun.modeling.mixers.titans_mac import TitansMAC

__all__ = [
    "GRU", "LSTM", "MIXERS", "OPTIONS", "SLSTM", "Atlas", "Attention", "DeepTransformer", "Elman", "GatedDelta",
    "Mamba2", "Memora", "Mixer", "Moneta", "OmegaNet", "ParaGRU", "ParaLSTM", "PrefixLinearAttention", "States",
    "TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL", "Yaad", "register",
]  # fmt: skip
