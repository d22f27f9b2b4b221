"""What this machine reaches: products, copies, exponentials, and each kernel by itself."""
