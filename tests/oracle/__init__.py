"""Independent reference: scalar loops written from the equations, slow and separate from the package.

Arrays are containers only: every sum, product and comparison is done on Python floats, one element at a time. Nothing
here imports the package under test. A mistake passes unnoticed only if it is made twice, in two forms.

basic         1x1 and general convolution, layer norm over channels, GELU, softmax, average pooling
geometry      the four coordinate conventions, each as its own source states it
sampling      bilinear sampling of a map at one point, and its right-hand slopes
bias          the position biases, for one head, one query, one key
deformable    the whole deformable attention layer
windows       (shifted) window attention, as a rule for visible keys
neighborhood  neighborhood attention, likewise
peers         the other attentions and convolutions that deformable attention is compared with
released      the released modules' arguments and state dicts, with the names used here
"""
