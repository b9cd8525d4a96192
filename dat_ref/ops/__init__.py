"""The operations of the spec, in reading order: basic → grid → offsets → sampling → bias → attention.

Inside each file, top to bottom: the equation, the forward, its gradient (``*_vjp``), its cost (``*_macs``).
"""
