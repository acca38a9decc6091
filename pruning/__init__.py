"""How a dense model becomes 2:4: training under the mask, from the data and the dense model as a teacher."""
