"""Benchmark: time and memory of attention and backbones, compared in one run on one machine.

=================  =================================================================================================
`cases`            shapes
`implementations`  attention by each backend, and torch's attention without bias
`released`         backbone in the formulation of the released code
`models`           backbones: released formulation, this package, rewritten for inference, compiled
`agreement`        check that two implementations give equal results; no time is reported before it passes
`timing`           median times, measured in alternating order
`memory`           peak memory of a new process or of the GPU's allocator
`profile`          share of each kind of operation in a model's time
`measure`          one comparison: check, time, memory
`run`              all comparisons, and a description of the machine
`report`           tables
=================  =================================================================================================

The command is ``dat-ref bench``.
"""
