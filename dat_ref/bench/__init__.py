"""How long attention and backbones take, and how much memory, as ratios measured side by side in one run.

=================  =================================================================================================
`cases`            the shapes
`implementations`  attention by each backend, torch's own without bias beside them
`released`         a backbone that computes as the released code does
`models`           backbones as released, as here, rewritten for inference, compiled
`agreement`        whether two implementations compute the same: no speed is told before they do
`timing`           seconds, by turns
`memory`           peak memory, of a fresh process or of the GPU's allocator
`profile`          where the time of a model goes
`measure`          one comparison: check, time, weigh
`run`              all of them, and where they ran
`report`           tables
=================  =================================================================================================

The command is ``dat-ref bench``.
"""
