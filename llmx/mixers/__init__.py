"""One file a token mixer; none imports another.

A constructor takes the `Site` where the mixer stands. It raises ValueError for a size below 1, for heads that do not
divide a width, and for a value outside the bounds that its docstring states. The message starts with the argument's
name. Costs count one sequence. A state does not grow with the text unless its size has a T or an S, or grows by a
token. A recurrence has no positions unless its docstring names them.
"""
