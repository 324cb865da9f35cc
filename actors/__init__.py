"""One file per actor; they meet on subjects and never import each other."""
