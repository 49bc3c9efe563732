"""One module or package for each implementation of the operations; `dispatch` picks one of them for a call."""
