"""Experiments: what a trained network does, measured by scripts that write JSON; pages are written from those files.

=============  ==================================================================================
`measures`     how far points are from an object, and how sure a mean is
`knock_out`    does the network that ships use its offsets? They are taken away, and others given
`page`         the page of the site, written from what was found
=============  ==================================================================================
"""
