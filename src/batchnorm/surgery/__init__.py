"""Operations on whole models: take their batch normalization over, give it back, fuse it with what follows."""
