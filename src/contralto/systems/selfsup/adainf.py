"""AdaInf: generated pictures help contrastive learning if real ones are repeated and the augmentation is made weaker.

More data make the graph of samples that augmentations connect denser, which is what strong augmentation was for; but they come
from another distribution, and strong augmentation also changes what a picture shows. So real pictures are drawn about ten
times as often as generated ones, and augmentation is halved; the loss and the number of steps stay as they are.

Do Generated Data Always Help Contrastive Learning?, Wang, Zhang and Wang, ICLR 2024, arXiv 2403.12448. The official code copies
the real pictures ten times; here rows are repeated (`contralto.data.mixture.MixtureSampler`), and nothing is copied. There, a
script reads generated pictures with their colours in another order than real ones; here both are RGB.
"""
