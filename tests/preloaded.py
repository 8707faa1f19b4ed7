"""Imported last by the server that forks all ranks: does once what every rank's first time would cost each of them."""

import gc
import io

import deepspeed.ops
import deepspeed.runtime.zero.muon.original_muon  # and with it torch's compiler
from triton import knobs

from riverrun.train import plot
from tests.interpreting import hasten, steady_products

if knobs.runtime.interpret:
    hasten()
    steady_products()
_ = deepspeed.ops.__compatible_ops__  # runs compilers
plot.loss_curve([{"tokens": 1, "loss": 1.0, "kind": "train"}], io.BytesIO(), "")  # finds the fonts
gc.collect()
gc.freeze()  # a rank's collections, eight for each of DeepSpeed's engines, then pass over all that is here
