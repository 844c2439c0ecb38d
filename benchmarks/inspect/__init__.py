"""What compilers made of the kernels: registers, spills, instructions and counts of a simulator. No times."""
