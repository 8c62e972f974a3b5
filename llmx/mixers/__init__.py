"""One file a token mixer; none imports another.

A constructor takes the `Site` where the mixer stands. It raises ValueError for a size below 1 and for a value outside
the bounds that its docstring states; the message starts with the argument's name. A state does not grow with the text
unless its size has a T or an S.
"""
