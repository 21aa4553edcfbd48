"""What a quantised weight is on disk: one module per layout, on the host, in numpy. ``registry`` lists them.

Letters here: a linear map has K inputs and N outputs; G groups of inputs share scales.
"""
