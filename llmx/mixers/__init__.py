"""One file a token mixer; none imports another.

A constructor raises ValueError for a size below 1 and for a value outside the bounds that its docstring states. The
message starts with the argument's name.
"""
