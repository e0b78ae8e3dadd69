"""Element-wise operations that quantise what they compute, without writing it in 16 bits first."""
