# Both set everything up; TORCH=2.8.0 in front takes another torch. dev.py says more, and needs no make.
.PHONY: demo test
demo:
	python3 dev.py demo
test:
	python3 dev.py test
