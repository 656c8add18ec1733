"""Says which tokens llama.cpp makes of texts: argv has the GGUF file, standard input a list of texts; a list of lists of ids comes out."""

import json
import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in json.load(sys.stdin)]
json.dump(tokens, sys.stdout)
