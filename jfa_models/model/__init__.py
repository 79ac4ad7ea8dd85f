"""What a decoder is: a pure module of parameters, and the numbers that shape it."""
