"""The second road to every number: scalar loops written from the equations, slow and on their own.

Arrays are containers only: every sum, product and comparison is made on Python floats, one element at a time.
Nothing here imports the package under test; a mistake must be made twice, in two forms, to go unseen.

basic         1x1 and general convolution, layer norm over channels, GELU, softmax, average pooling
geometry      the four coordinate conventions, each in the words of its own source
sampling      bilinear reading of a map at one point, and its right-hand slopes
bias          the position biases, for one head, one query, one key
deformable    the whole deformable attention layer
windows       (shifted) window attention, as a rule of who sees whom
neighborhood  neighborhood attention, likewise
peers         the other attentions and convolutions that deformable attention is compared with
released      the released modules' arguments and state dicts, put into the names used here
"""
