"""What the operations on models share: finding layers, reading what they do, and seeing what is next to them."""
