# All set everything up; TORCH=2.8.0 or PYTHON=3.13 in front takes another. dev.py says more, and needs no make.
.PHONY: demo test test-all
demo:
	python3 dev.py demo
test:
	python3 dev.py test
test-all:
	python3 dev.py test-all
