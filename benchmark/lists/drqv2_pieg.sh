# PIE-G on DMC-GB (Yuan et al. 2022): one line per row of a table or point of a figure, one run per task.
#
#     python benchmark/launch.py benchmark/lists/drqv2_pieg.sh --seeds 5    # the paper does not say how many
#
# 1M frames per task. Needs a network (the ImageNet weights), `make dmcgb`, torchvision's small Places365 in
# data/places365, and a GPU. DrawerWorld needs `make drawerworld`. The authors' code has no other values than these.
PLACES=data/places365/data_256_standard
TASKS="cartpole-swingup walker-stand walker-walk ball_in_cup-catch cheetah-run finger-spin"
LOOKS="--eval-every 100000 --eval-modes color_easy color_hard video_easy video_hard"
SEEN="--overlay-dir $PLACES $LOOKS"

# Table 1: PIE-G, and from the same script DrQ-v2 and DrQ-v2 with overlaid pictures, which is close to SVEA.
for task in $TASKS; do
    python algos/drqv2_pieg.py --env-id $task --exp-name pieg $SEEN
    python algos/drqv2_pieg.py --env-id $task --exp-name drqv2 --encoder drqv2 --strong-augmentation none $LOOKS
    python algos/drqv2_pieg.py --env-id $task --exp-name svea --encoder drqv2 $SEEN
done

# Table 3: the layer after which the encoder is cut. Layer 2 is Table 1's.
for task in walker-walk cheetah-run walker-stand; do
    for layer in 1 3 4; do
        python algos/drqv2_pieg.py --env-id $task --exp-name layer$layer --encoder-layer $layer $SEEN
    done
done

# Figure 4b: batch normalisation that keeps the pretrained statistics. The one that adapts is Table 1's; it is also
# evaluated with the statistics of training.
for task in $TASKS; do
    python algos/drqv2_pieg.py --env-id $task --exp-name fixed --batch-norm fixed $SEEN
    python benchmark/analyses/evaluate.py @pieg/$task --eval-batch-norm running
done

# The text's measure of features of one state under two backgrounds.
python benchmark/analyses/feature_maps.py PIE-G=@pieg/walker-walk SVEA=@svea/walker-walk --out @/.

# Figure 4a: deformed shapes, whose factors are ours. Table 2: DrawerWorld. `test` plays the runs on all variants.
for suite in manipulation drawerworld; do
    python benchmark/suites/$suite.py drqv2_pieg --exp-name pieg --overlay-dir $PLACES
    python benchmark/suites/$suite.py drqv2_pieg --exp-name drqv2 --encoder drqv2 --strong-augmentation none
    python benchmark/suites/$suite.py drqv2_pieg --exp-name svea --encoder drqv2 --overlay-dir $PLACES
done
for name in pieg drqv2 svea; do
    python benchmark/suites/manipulation.py test @$name/reach-duplo
    python benchmark/suites/drawerworld.py test @$name/drawer-close
done
