"""Operations of the reference, in reading order: basic → grid → offsets → sampling → bias → attention.

Each file has the same order: equation, forward function, gradient (``*_vjp``), cost (``*_macs``).
"""
