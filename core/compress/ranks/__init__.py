"""Several processes that compute one model together: one for each GPU of a job, or several of one CPU.

| module | contents |
|---|---|
| `group` | the processes as one of them sees the others: sums, and results that are handed round |
| `launch` | starts the processes, runs a function in all of them, and ends them; used by the process that runs the job |
| `member` | the program of such a process |
| `nursery`, `forks` | the process that they are forked from, and how `launch` asks it |
| `messages` | what both say to each other |
"""
