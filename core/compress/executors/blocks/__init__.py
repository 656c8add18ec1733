"""The blocks executor: a calibrated model, one block in memory at a time, whatever the model's size.

What enters the first block is captured once for all calibration samples. Then for each block: its weights are read, the samples run through
it while the inputs of every linear layer are summed up, the method settles its weights, the samples run through it again with the new
weights, and it is written as a shard of its own. Reading the next block and writing the last block overlap with the arithmetic.

| module | what is in it |
|---|---|
| `method` | what a calibrated method provides, and what it returns |
| `plan` | what a run works on: batch size, dtype, and the digest that names its records |
| `forward` | the samples' hidden states, and running them through a block |
| `settle` | asking the method for the new weights of a block |
| `two_pass` | watch all layers of a block, settle them, run the samples again |
| `in_turn`, `groups` | settle each group of layers before the next one runs: a single pass, where memory allows it |
| `resume` | the files of a run: shards, the records beside them, and what of them an earlier attempt left whole |
| `writer` | the thread that writes |
| `press` | the loop over the blocks |
"""

from nightpress.core.compress.executors.blocks.method import CacheStandIn, FinalTensor, Method, RunResult
from nightpress.core.compress.executors.blocks.press import press_blocks
from nightpress.core.compress.executors.watch import Inputs, Statistic

__all__ = ["CacheStandIn", "FinalTensor", "Inputs", "Method", "RunResult", "Statistic", "press_blocks"]
