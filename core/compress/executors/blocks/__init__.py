"""The blocks executor: applies a calibrated method to a model of any size, with one block in memory at a time.

First, the hidden states at the first block's input are captured for all calibration samples. Then, for each block:

1. Read its weights.
2. Run the samples through it, and collect statistics of the inputs of its linear layers.
3. Settle its weights with the method, i.e. compute their final values.
4. Run the samples through it again with the new weights.
5. Write it as a shard of its own.

While a block is computed, the next one is read, unless blocks are too large for that, and the previous one is written.

Several processes (`PassContext.ranks`) each hold some of the samples, and run them through the same block. Their statistics are summed, and
they share out the work of settling. All end with the same weights. The first process writes.

| module | contents |
|---|---|
| `method` | the interface of a calibrated method, and the result of a run |
| `plan` | the inputs of a run: batch size, dtype, and the digest that names its records |
| `forward` | the samples' hidden states, and how they run through a block |
| `shared` | settled tensors of several processes |
| `settle` | the call of the method for the new weights of a block |
| `lessons` | for methods that learn: the source model's outputs, and the error of a block with other weights |
| `two_pass` | watch all layers of a block, settle them (a mixture's part by part), run the samples again |
| `in_turn`, `groups` | settle each group of layers before the next group runs: a single pass, if memory allows it |
| `resume` | the files of a run: shards and records, which show the blocks that an earlier attempt finished |
| `writer` | the thread that writes |
| `press` | the loop over the blocks |
"""

from nightpress.core.compress.executors.blocks.method import CacheStandIn, FinalTensor, Method, RunResult
from nightpress.core.compress.executors.blocks.press import press_blocks
from nightpress.core.compress.executors.watch import Inputs, Statistic

__all__ = ["CacheStandIn", "FinalTensor", "Inputs", "Method", "RunResult", "Statistic", "press_blocks"]
